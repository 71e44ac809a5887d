# SPDX-License-Identifier: Apache-2.0
"""The shipped examples: policies that can take effect, pods that admission takes, hardened where they can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from valve_api.load import load_policy
from valve_api.names import RESOURCE_OFFLINE_MEMORY, RESOURCE_ONLINE_GPU
from valve_operator.admission import Admitted, Defaults, decide

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
POLICIES = sorted(EXAMPLES.glob("policy*.yaml"))
DEFAULTS = Defaults("valve-online", "valve-offline")


def pod_of(file: str) -> dict[str, Any]:
    """The pod that the example's controller makes."""
    for entry in yaml.safe_load_all((EXAMPLES / file).read_text()):
        if entry["kind"] in ("Deployment", "Job"):
            template = entry["spec"]["template"]
            return {"apiVersion": "v1", "kind": "Pod", **template}
    raise AssertionError(f"{file} has no controller of pods")


def test_there_is_a_policy_for_gpus_and_one_for_none() -> None:
    assert [path.name for path in POLICIES] == ["policy-cpu.yaml", "policy.yaml"]


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_a_policy_is_valid(path: Path) -> None:
    policy = load_policy(path)
    assert policy.spec.node_selector, "an example that takes every node of a cluster is a trap"
    assert (policy.spec.cpu_device is not None) == path.stem.endswith("cpu")


@pytest.mark.parametrize(
    ("file", "workload", "resource", "amount"),
    [
        ("online.yaml", "online", RESOURCE_ONLINE_GPU, "1"),
        ("offline.yaml", "offline", RESOURCE_OFFLINE_MEMORY, "24"),
    ],
)
def test_admission_takes_the_pods(file: str, workload: str, resource: str, amount: str) -> None:
    answer = decide(pod_of(file), DEFAULTS)
    assert isinstance(answer, Admitted), answer
    assert answer.pod["spec"]["containers"][0]["resources"]["limits"][resource] == amount
    assert answer.pod["spec"]["priorityClassName"] == f"valve-{workload}"
    assert answer.pod["metadata"]["labels"]["valve.io/workload"] == workload


@pytest.mark.parametrize("file", ["online.yaml", "offline.yaml"])
def test_the_pods_ask_for_no_privilege(file: str) -> None:
    spec = pod_of(file)["spec"]
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert "memory" in container["resources"]["limits"]


def test_the_offline_pod_has_no_probe_that_a_pause_would_fail() -> None:
    assert not any("livenessProbe" in container for container in pod_of("offline.yaml")["spec"]["containers"])


def test_install_guide_names_the_examples() -> None:
    guide = (ROOT / "docs/install.md").read_text()
    for path in EXAMPLES.glob("*.yaml"):
        if path.name != "demo.yaml":
            assert f"examples/{path.name}" in guide, path.name
