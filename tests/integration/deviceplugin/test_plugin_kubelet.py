# SPDX-License-Identifier: Apache-2.0
"""The plugin process against a kubelet: registration, lists, admission, restarts of either side."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

import pytest
from device_node import GPU_A, GPU_B, FakeAgent, Plugin
from fake_kubelet import FakeKubelet

ONLINE, OFFLINE = "valve.io/online-gpu", "valve.io/offline-memory-gib"
Until = Callable[[Callable[[], bool], str], None]


def ready(kubelet: FakeKubelet, seats: int = 2, units: int = 28) -> None:
    kubelet.wait(lambda: kubelet.capacity(ONLINE)[1] == seats, "seats")
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == units, f"{units} offline units")


def gpus_of(plugin: Plugin) -> dict[str, list[str]]:
    """container -> GPUs, of entries whose container is known."""
    return {
        entry["owner"]["container"]: entry["gpus"]
        for entry in plugin.allocations()["allocations"]
        if entry["owner"]
    }


def test_both_resources_are_listed_with_what_the_agent_lends(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin
) -> None:
    plugin.start()
    ready(kubelet)
    assert kubelet.capacity(OFFLINE) == (32, 28)
    assert kubelet.capacity(ONLINE) == (2, 2)
    assert sorted(kubelet.registrations) == [OFFLINE, ONLINE]


def test_a_container_gets_the_runtime_and_one_gpu(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin
) -> None:
    plugin.start()
    ready(kubelet)
    offline = kubelet.admit("batch", {OFFLINE: 10}).answers[OFFLINE]
    online = kubelet.admit("serve", {ONLINE: 1}, pod="online").answers[ONLINE]
    assert dict(offline.envs) == {
        "VALVE_SOCKET": str(agent.path), "VALVE_WORKLOAD": "offline", "VALVE_GPU": GPU_A,
        "VALVE_PYTHONPATH": "/opt/valve/0.1.0/python", "VALVE_MEMORY_GIB": "10",
        "NVIDIA_VISIBLE_DEVICES": GPU_A,
    }  # fmt: skip
    assert online.envs["VALVE_WORKLOAD"] == "online"
    assert online.envs["VALVE_GPU"] == GPU_B, "the seat of the GPU with the least offline memory"
    mounts = {mount.container_path: (mount.host_path, mount.read_only) for mount in offline.mounts}
    assert mounts == {
        "/opt/valve/0.1.0": ("/opt/valve/0.1.0", True),
        "/etc/ld.so.preload": ("/opt/valve/0.1.0/ld.so.preload", True),
        str(agent.path.parent): (str(agent.path.parent), True),
    }


def test_the_published_ledger_says_whose_it_is(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin
) -> None:
    plugin.start()
    ready(kubelet)
    kubelet.admit("main", {OFFLINE: 3}, pod="job", namespace="batch")
    document = plugin.allocations()
    (entry,) = document["allocations"]
    assert document["schema"] == "valve.io/allocations/v1"
    assert entry["owner"] == {"namespace": "batch", "pod": "job", "container": "main"}
    assert (entry["gpus"], entry["memory_gib"], len(entry["device_ids"])) == ([GPU_A], 3, 3)
    assert json.loads((plugin.state / "allocations.json").read_text()) == document
    assert (plugin.state / "allocations.json").stat().st_mode & 0o777 == 0o600
    assert (plugin.state / "allocations.sock").stat().st_mode & 0o777 == 0o600


def test_the_kubelet_restarts(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    """Every socket is deleted; the plugin comes back by itself and what was given stays given."""
    plugin.start()
    ready(kubelet)
    before = kubelet.admit("a", {OFFLINE: 5})
    kubelet.stop()
    kubelet.start()
    ready(kubelet)
    assert kubelet.admit("a", {OFFLINE: 5}) is before
    assert gpus_of(plugin) == {"a": [GPU_A]}
    assert kubelet.registrations.count(OFFLINE) == 2


def test_the_plugin_is_killed(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    plugin.start()
    ready(kubelet)
    kubelet.admit("a", {OFFLINE: 5})
    assert gpus_of(plugin) == {"a": [GPU_A]}
    assert plugin.stop(signal.SIGKILL) == -signal.SIGKILL
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 0, "devices of a dead plugin unhealthy")
    plugin.start()
    ready(kubelet)
    assert gpus_of(plugin) == {"a": [GPU_A]}
    assert kubelet.admit("a", {OFFLINE: 5}).ids[OFFLINE], "admitted again after the restart"


def test_the_agent_is_gone_and_comes_back(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    """Free offline units end after the grace; seats and what containers hold stay."""
    plugin.start()
    ready(kubelet)
    given = kubelet.admit("a", {OFFLINE: 5})
    agent.stop()
    kubelet.wait(lambda: kubelet.capacity(OFFLINE) == (32, 5), "only what is held is healthy")
    assert kubelet.capacity(ONLINE) == (2, 2)
    assert all(kubelet.resources[OFFLINE].devices[token] for token in given.ids[OFFLINE])
    assert kubelet.admit("a", {OFFLINE: 5}) is given, "a pod is admitted again while its agent is away"
    agent.start()
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 28, "lent again")


def test_the_plugin_starts_without_agent(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    """It remembers the GPUs: online pods are admitted."""
    plugin.start()
    ready(kubelet)
    assert plugin.stop() == 0
    agent.stop()
    plugin.start()
    ready(kubelet, seats=2, units=0)
    assert kubelet.admit("serve", {ONLINE: 1}).answers[ONLINE].envs["VALVE_WORKLOAD"] == "online"


def test_the_reserve_grows_and_shrinks(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    plugin.start()
    ready(kubelet)
    for lendable, units in ((4, 20), (0, 16), (12, 28)):
        agent.gpus[GPU_A] = (16, lendable, 1)
        ready(kubelet, units=units)


def test_a_released_pod_frees_its_gpu(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    plugin.start("--settle", "0.5")
    ready(kubelet)
    kubelet.admit("a", {OFFLINE: 12})
    assert gpus_of(plugin) == {"a": [GPU_A]}
    assert gpus_of(plugin) == {"a": [GPU_A]}
    kubelet.forget("pod")
    kubelet.wait(lambda: not plugin.allocations()["allocations"], "the entry ends")
    assert kubelet.admit("b", {OFFLINE: 12}).answers[OFFLINE].envs["VALVE_GPU"] == GPU_A


def test_ids_on_two_gpus_are_one_gpu(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    """A kubelet that does not ask what is preferred picks at random; nobody fails, nothing is given twice."""
    plugin.start()
    ready(kubelet)
    for name in ("a", "b", "c"):
        given = kubelet.admit(name, {OFFLINE: 8}, pod=name, prefer=False)
        assert given.answers[OFFLINE].envs["VALVE_GPU"] in (GPU_A, GPU_B)
    entries = plugin.allocations()["allocations"]
    used = {
        gpu: sum(e["memory_gib"] - e["shortage_gib"] for e in entries if e["gpus"] == [gpu])
        for gpu in (GPU_A, GPU_B)
    }
    assert used == {GPU_A: 8, GPU_B: 16}
    assert sum(e["shortage_gib"] for e in entries) == 0


def test_a_fragmented_request_is_admitted_short(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin
) -> None:
    """28 units are free, but no GPU has 20: admitted, said, counted; never refused."""
    plugin.start()
    ready(kubelet)
    given = kubelet.admit("a", {OFFLINE: 20})
    assert given.answers[OFFLINE].envs["VALVE_GPU"] == GPU_B
    (entry,) = plugin.allocations()["allocations"]
    assert entry["shortage_gib"] == 4
    assert [event["shortage_gib"] for event in plugin.events("allocate")] == [4]


def test_a_kubelet_that_cannot_take_the_list_is_registered_with_again(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin
) -> None:
    """The real one gives up after ResourceExhausted and never asks again."""
    kubelet.receive_bytes_max = 256
    plugin.start("--listen", "1")
    kubelet.wait(lambda: kubelet.registrations.count(OFFLINE) >= 2, "a second registration")
    kubelet.receive_bytes_max = 4 << 20
    ready(kubelet)


def test_its_socket_is_lost(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    """One new registration, and the end of the old server does not take the new socket with it."""
    plugin.start()
    ready(kubelet)
    (kubelet.plugins / "valve-offline.sock").unlink()
    kubelet.wait(lambda: kubelet.registrations.count(OFFLINE) == 2, "registered again")
    ready(kubelet)
    time.sleep(1.5)
    assert kubelet.registrations.count(OFFLINE) == 2
    assert kubelet.registrations.count(ONLINE) == 1
    assert kubelet.admit("a", {OFFLINE: 1}).ids


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_told(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin, number: signal.Signals
) -> None:
    plugin.start()
    ready(kubelet)
    assert plugin.stop(number) == 0
    assert [path.name for path in kubelet.plugins.iterdir()] == ["kubelet.sock"]
    assert not (plugin.state / "allocations.sock").exists()


def test_no_kubelet_yet(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin, until: Until) -> None:
    kubelet.stop()
    plugin.start()
    until(lambda: bool(plugin.log.exists() and plugin.events("start")), "the plugin starts")
    kubelet.start()
    ready(kubelet)
