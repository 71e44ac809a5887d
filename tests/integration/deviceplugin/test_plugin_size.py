# SPDX-License-Identifier: Apache-2.0
"""The largest node we promise, 8 GPUs of 141 GiB: what a list weighs and the process, and a storm on it."""

from __future__ import annotations

import random
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from device_node import FakeAgent, Plugin, free_port, get
from fake_kubelet import AdmissionFailed, FakeKubelet

ONLINE, OFFLINE = "valve.io/online-gpu", "valve.io/offline-memory-gib"
UNITS = 141
GPUS = [f"GPU-{index:08x}-1111-4222-8333-0123456789ab" for index in range(8)]
LIST_BYTES_MAX = 100_000
RSS_BYTES_MAX = 60 << 20


def begin(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin, *options: str) -> None:
    agent.gpus = {gpu: (UNITS, UNITS, index % 2) for index, gpu in enumerate(GPUS)}
    plugin.start(*options)
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 8 * UNITS, "all units")
    kubelet.wait(lambda: kubelet.capacity(ONLINE)[1] == 8, "all seats")


def resident_bytes(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def test_list_and_process_are_small(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin, record_property: pytest.RecordProperty
) -> None:
    """While pods come and go and online bursts change every list, scraped as it would be."""
    shuffle = random.Random(7)
    port = free_port()
    begin(kubelet, agent, plugin, "--metrics-port", str(port))
    for turn in range(8):
        lists = len(kubelet.resources[OFFLINE].lists)
        agent.gpus = {gpu: (UNITS, shuffle.randint(60, UNITS), 1) for gpu in GPUS}
        for pod in range(20):
            kubelet.admit("main", {OFFLINE: shuffle.randint(1, 8)}, pod=f"{turn}-{pod}")
        if turn > 2:
            for pod in range(20):
                kubelet.forget(f"{turn - 3}-{pod}")
        plugin.allocations()
        kubelet.wait(lambda: len(kubelet.resources[OFFLINE].lists) > lists, "a new list")  # noqa: B023
        get(port, "/metrics")
    largest = max(answer.ByteSize() for answer in kubelet.resources[OFFLINE].lists)
    resident = resident_bytes(plugin.pid)
    record_property("list_bytes", largest)
    record_property("peak_rss_bytes", resident)
    print(f"ListAndWatch {largest} bytes, peak RSS {resident / (1 << 20):.1f} MiB")
    assert largest < LIST_BYTES_MAX
    assert resident < RSS_BYTES_MAX


def test_a_storm_crosses_no_pods(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    """Pods ask for more than there is, in random ids and with restarts of either side: those that the kubelet
    has ids for are admitted, each on one GPU, and no GiB is promised twice while anything is left."""
    begin(kubelet, agent, plugin)
    shuffle = random.Random(11)
    given: dict[str, str] = {}
    refused: list[str] = []
    for number in range(120):
        name = f"pod-{number}"
        if number == 40:
            plugin.stop(signal.SIGKILL)
            plugin.start()
            kubelet.wait(lambda: sum(kubelet.capacity(OFFLINE)) == 2 * 8 * UNITS, "the plugin is back")
        if number == 80:
            kubelet.stop()
            kubelet.start()
            kubelet.wait(lambda: sum(kubelet.capacity(OFFLINE)) == 2 * 8 * UNITS, "the kubelet knows it")
        size = shuffle.randint(1, 24)
        try:
            answer = kubelet.admit("main", {OFFLINE: size}, pod=name, prefer=bool(number % 3)).answers[
                OFFLINE
            ]
        except AdmissionFailed as error:
            refused.append(str(error))
        else:
            given[name] = answer.envs["VALVE_GPU"]
    assert len(refused) > 10
    assert all("are available" in error for error in refused), "only for lack of ids"
    entries = plugin.allocations()["allocations"]
    assert {e["owner"]["pod"]: e["gpus"][0] for e in entries} == given, "everyone has what its answer said"
    used = Counter[str]()
    for entry in entries:
        used[entry["gpus"][0]] += entry["memory_gib"]
    assert sum(used.values()) == sum(len(ids) for c in kubelet.pods.values() for ids in c.ids.values())
    over = sum(max(0, units - UNITS) for units in used.values())
    assert over <= sum(entry["shortage_gib"] for entry in entries), "nothing beyond what was said to be short"
    ids = [token for entry in entries for token in entry["device_ids"]]
    assert len(ids) == len(set(ids))
