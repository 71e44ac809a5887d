# SPDX-License-Identifier: Apache-2.0
"""What a ColocationNode asks of the agent, without an API server."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from valve_agent.kube import node as node_module
from valve_agent.kube.api import Api, Server
from valve_agent.kube.node import KubernetesNode, Wanted, version_of, wanted_of


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


GPUS = [80 << 30, 40 << 30, 24 << 30]


def follow(kubernetes: KubernetesNode, monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """The slab sizes that `count` agents are given in the next second; 0: nothing new for this one."""
    given = [0] * count
    agents: Any = [
        SimpleNamespace(
            number=number, settings=None, gate=None, events=SimpleNamespace(emit=lambda *_, **__: 0)
        )
        for number in range(count)
    ]

    def apply(agent: Any, _gate: object, settings: Any) -> None:
        given[agent.number] = settings.slab_bytes

    monkeypatch.setattr(node_module.live, "apply", apply)
    monkeypatch.setattr(node_module.live, "needs_restart", lambda now, wanted: "")
    kubernetes._agents = agents
    kubernetes._follow()
    return given


def newer() -> dict[str, Any]:
    return node(generation=2, cpuDevice=None, memory={"slabSize": "64Mi"})


@pytest.mark.parametrize(
    ("description", "before", "shared", "followed", "given"),
    [
        ("no change", 3, GPUS, 1, [0, 0, 0]),
        ("no change, one cannot be shared", 3, GPUS[:2], 1, [0, 0]),
        ("changed after the first", 1, GPUS, 1, [64 << 20] * 3),
        ("changed after the first, one cannot be shared", 1, GPUS[:2], 1, [64 << 20] * 2),
        ("changed after all", 3, GPUS, 1, [64 << 20] * 3),
        ("changed after all, one cannot be shared", 3, GPUS[1:], 1, [64 << 20] * 2),
        ("changed before all", 0, GPUS, 2, [0, 0, 0]),
    ],
)
def test_a_change_while_gpus_are_probed_reaches_every_gpu(
    kubernetes: KubernetesNode,
    monkeypatch: pytest.MonkeyPatch,
    description: str,
    before: int,
    shared: list[int],
    followed: int,
    given: list[int],
) -> None:
    """`before` GPUs are probed before the change; what is `followed` is what all have."""
    kubernetes._seen(node(cpuDevice=None))
    for size in GPUS[:before]:
        kubernetes.settings(size)
    changes = not description.startswith("no change")
    if changes:
        kubernetes._seen(newer())
    for size in GPUS[before:]:
        kubernetes.settings(size)
    kubernetes.start([], shared)
    facts = kubernetes.facts()
    assert (facts["generation"], facts["ready"]) == (followed, not changes or followed == 2)
    assert follow(kubernetes, monkeypatch, len(shared)) == given
    facts = kubernetes.facts()
    assert (facts["generation"], facts["ready"]) == (2 if changes else 1, True)
    kubernetes.close()


@pytest.mark.parametrize(
    ("description", "change", "count"),
    [
        ("one more GPU is probed", lambda kubernetes: kubernetes.settings(GPUS[2]), 3),
        ("a GPU cannot be shared", lambda kubernetes: kubernetes.start([], GPUS[:1]), 1),
    ],
)
def test_a_change_that_arrives_meanwhile_has_settings_for_every_gpu(
    kubernetes: KubernetesNode,
    monkeypatch: pytest.MonkeyPatch,
    description: str,
    change: Callable[[KubernetesNode], object],
    count: int,
) -> None:
    """The watch's thread is held up between computing what is wanted and storing it."""
    kubernetes._seen(node(cpuDevice=None))
    for size in GPUS[:2]:
        kubernetes.settings(size)
    computed, store = threading.Event(), threading.Event()

    def slow(document: Mapping[str, Any], sizes: Sequence[int | None]) -> Wanted:
        wanted = wanted_of(document, sizes)
        if threading.current_thread() is watch:
            computed.set()
            assert store.wait(30)
        return wanted

    monkeypatch.setattr(node_module, "wanted_of", slow)
    watch = threading.Thread(target=kubernetes._seen, args=(newer(),))
    main = threading.Thread(target=change, args=(kubernetes,), daemon=True)
    watch.start()
    assert computed.wait(30)
    main.start()
    main.join(0.5)  # long enough to get in between, if it can
    store.set()
    watch.join(30)
    main.join(30)
    assert not main.is_alive()
    assert kubernetes._wanted is not None
    assert (kubernetes._wanted.generation, len(kubernetes._wanted.settings)) == (2, count)
    kubernetes.close()
