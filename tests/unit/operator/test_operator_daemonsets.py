# SPDX-License-Identifier: Apache-2.0
"""Templates: what is refused with which sentence, and that nothing but ours is changed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from simulated_cluster import template

from valve_operator import daemonsets
from valve_operator.errors import TemplateError
from valve_operator.views import ANNOTATION_DIGEST


def write(folder: Path, **files: str) -> Path:
    good = yaml.safe_dump(template("valve-agent"))
    for name in daemonsets.FILES:
        (folder / name).write_text(files.get(name.partition(".")[0].replace("-", "_"), good))
    return folder


BAD = [
    ("not YAML", "a: [", "agent.yaml: not YAML"),
    ("another kind", "apiVersion: apps/v1\nkind: Deployment", "must be one DaemonSet of apps/v1"),
    ("a list", "- a", "must be one DaemonSet of apps/v1"),
    ("no name", "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {}", "metadata.name is missing"),
]


@pytest.mark.parametrize(("case", "text", "sentence"), BAD, ids=[case[0] for case in BAD])
def test_a_bad_template(case: str, text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=sentence):
        daemonsets.read(write(tmp_path, agent=text))


def test_a_folder_without_templates(tmp_path: Path) -> None:
    with pytest.raises(
        TemplateError, match=r"--node-templates must hold agent\.yaml and device-plugin\.yaml"
    ):
        daemonsets.read(tmp_path)


def test_the_template_is_not_changed_and_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first, _ = daemonsets.read(write(tmp_path))
    before = copy.deepcopy(first)
    made = daemonsets.manifest(first, "ns", "owner", "u1")
    assert first == before

    def digest(**changes: str) -> str:
        changed = {"namespace": "ns", "name": "owner", "uid": "u1", **changes}
        again = daemonsets.manifest(first, changed["namespace"], changed["name"], changed["uid"])
        return str(again["metadata"]["annotations"][ANNOTATION_DIGEST])

    assert digest() == made["metadata"]["annotations"][ANNOTATION_DIGEST]
    assert digest(uid="u2") != digest(), "a new owner must be written"
    first["spec"]["template"]["spec"]["containers"][0]["image"] = "new"
    assert digest() != made["metadata"]["annotations"][ANNOTATION_DIGEST]
