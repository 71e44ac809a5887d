# SPDX-License-Identifier: Apache-2.0
"""Outside judges of what the chart renders: kubeconform with the API server's own schemas, and kube-score.

Gap: the kinds of the Prometheus operator and of cert-manager have no schema here; they are skipped by name.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_schemas
import pytest
import yaml
from helm_chart import CHART, CI_VALUES, NAMESPACE, node_templates, render

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.programs import program

CI = pytest.mark.parametrize("values", CI_VALUES, ids=[path.stem for path in CI_VALUES])
FOREIGN = "PodMonitor,ServiceMonitor,PrometheusRule,Certificate,Issuer"
GRADE_ALL_OK = 10


def everything(values: Path) -> str:
    """The rendered chart and the DaemonSets in its ConfigMap, as one YAML stream."""
    objects = render(files=[values])
    made = list(node_templates(objects).values())
    for daemonset in made:
        daemonset["metadata"]["namespace"] = NAMESPACE  # as the operator does
    return yaml.safe_dump_all([*objects, *made])


@pytest.fixture(scope="session")
def schemas(bare_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> str:
    return api_schemas.write(bare_plane.kubectl, tmp_path_factory.mktemp("schemas"))


def conform(schemas: str, text: str) -> dict[str, Any]:
    done = subprocess.run(
        [program("kubeconform"), "-strict", "-output=json", "-summary", f"-skip={FOREIGN}",
         f"-schema-location={schemas}"],
        input=text, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@CI
def test_every_object_conforms_to_the_api_servers_schemas(schemas: str, values: Path) -> None:
    found = conform(schemas, everything(values))
    assert [entry["msg"] for entry in found.get("resources") or ()] == []
    assert found["summary"]["valid"] > 20
    assert found["summary"]["invalid"] == found["summary"]["errors"] == 0


def test_the_schemas_find_a_misspelt_field(schemas: str) -> None:
    text = everything(CI_VALUES[0]).replace("terminationGracePeriodSeconds", "terminationGracePeriod")
    found = conform(schemas, text)
    assert found["summary"]["invalid"] >= 3
    assert "terminationGracePeriod" in json.dumps(found)


def complaints(text: str) -> Iterator[tuple[str, str, str]]:
    """(check, component, container) of everything that kube-score calls less than fine."""
    done = subprocess.run(
        [program("kube-score"), "score", "--kubernetes-version=v1.32", "--output-format=json", "-"],
        input=text, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout, done.stderr
    for scored in json.loads(done.stdout):
        labels = scored["object_meta"].get("labels", {})
        component = labels.get("app.kubernetes.io/component", scored["object_meta"]["name"])
        for check in scored["checks"]:
            if check["skipped"] or check["grade"] >= GRADE_ALL_OK:
                continue
            for comment in check["comments"] or [{"path": ""}]:
                yield check["check"]["id"], component, comment["path"]


def test_kube_score_says_nothing_that_is_not_answered() -> None:
    wanted = {
        (entry["check"], component, container)
        for entry in yaml.safe_load((CHART / "ci/kube-score.yaml").read_text())["exceptions"]
        for component, containers in entry["where"].items()
        for container in containers
    }
    assert set(complaints(everything(CHART / "ci/defaults-values.yaml"))) == wanted


def test_every_exception_from_kube_score_says_why() -> None:
    for entry in yaml.safe_load((CHART / "ci/kube-score.yaml").read_text())["exceptions"]:
        assert len(entry["why"].split()) > 5, entry["check"]
