# SPDX-License-Identifier: Apache-2.0
"""What a ColocationNode asks of the agent, without an API server."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from valve_agent.kube.api import Api, Server
from valve_agent.kube.node import KubernetesNode, version_of, wanted_of


def node(uid: str = "u", generation: int = 1, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "n1", "uid": uid, "generation": generation},
        "spec": {
            "policy": {"name": "p"},
            "cpuDevice": {"memory": "128Mi"},
            "memory": {"slabSize": "2Mi"},
            **spec,
        },
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


@pytest.fixture
def kubernetes(tmp_path: Path) -> KubernetesNode:
    api = Api(Server("http://127.0.0.1:1", None, lambda: None))
    return KubernetesNode("n1", api, tmp_path / "none.sock", logs=tmp_path, stderr=io.StringIO())


@pytest.mark.parametrize(
    ("description", "spec", "problem"),
    [
        ("it holds", {}, ""),
        ("no device", {"cpuDevice": None}, "spec.cpuDevice: missing"),
        ("does not fit", {"memory": {"slabSize": "64Mi"}}, "spec.cpuDevice.memory"),
    ],
)
def test_what_is_wanted(description: str, spec: dict[str, Any], problem: str) -> None:
    wanted = wanted_of(node(**spec))
    assert (not wanted.settings) == bool(problem)
    assert problem in wanted.problem
    if problem:
        assert "ColocationNode n1" in wanted.problem


def test_fields_of_a_newer_operator_are_left_out_and_named() -> None:
    """During an upgrade the operator is newer than the agents of most nodes."""
    given = node(turbo=True, memory={"slabSize": "2Mi", "shape": {"deep": 1}})
    wanted = wanted_of(given)
    assert wanted.settings
    assert (wanted.problem, wanted.unknown) == ("", "spec.memory.shape, spec.turbo")
    assert given["spec"]["turbo"] is True, "what the watch gave is not changed"


def test_an_object_that_was_made_anew_is_looked_at_again(kubernetes: KubernetesNode) -> None:
    """Its generation is 1 as before; what it asks for is not."""
    kubernetes._seen(node("first"))
    kubernetes._seen(node("second", memory={"slabSize": "4Mi"}))
    assert kubernetes._wanted is not None
    (settings,) = kubernetes._wanted.settings
    assert settings.slab_bytes == 4 << 20
    assert version_of(node("a", 3)) == ("a", 3)


def test_a_status_change_is_no_new_settings(kubernetes: KubernetesNode) -> None:
    kubernetes._seen(node())
    before = kubernetes._wanted
    changed = node()
    changed["status"] = {"gpuCount": 1}
    kubernetes._seen(changed)
    assert kubernetes._wanted is before


def test_an_object_that_is_gone_changes_nothing(kubernetes: KubernetesNode) -> None:
    kubernetes._seen(node())
    before = kubernetes._wanted
    kubernetes._seen(None)
    assert kubernetes._wanted is before is not None


def test_settings_are_waited_for_and_then_given(kubernetes: KubernetesNode) -> None:
    kubernetes._seen(node())
    assert kubernetes.settings().slabs == 64
    assert kubernetes.facts()["ready"] is True
    kubernetes.close()


def test_each_gpu_gets_settings_of_its_own_size(kubernetes: KubernetesNode) -> None:
    kubernetes._seen(node(cpuDevice=None))
    sizes = [80 << 30, 40 << 30, 24 << 30]
    settings = [kubernetes.settings(size) for size in sizes]
    assert [round(100 * one.device_bytes / size) for one, size in zip(settings, sizes, strict=True)] == [
        60
    ] * 3
    kubernetes.start([], [sizes[0], sizes[2]])  # the second could not be shared
    kubernetes._seen(node(generation=2, cpuDevice=None, memory={"slabSize": "64Mi"}))
    assert kubernetes._wanted is not None
    assert [one.slab_bytes for one in kubernetes._wanted.settings] == [64 << 20] * 2
    kubernetes.close()
