# SPDX-License-Identifier: Apache-2.0
"""The plugin's shared state: what it lists, what it remembers, and what it does when the disk does not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from valve_api.container import ContainerName
from valve_api.names import RESOURCE_OFFLINE_MEMORY, RESOURCE_ONLINE_GPU
from valve_deviceplugin.allocator.lending import GIB, Report
from valve_deviceplugin.log import Log
from valve_deviceplugin.state import Node
from valve_deviceplugin.store import Store
from valve_deviceplugin.timing import Timing


class Rig:
    """A Node with a clock that stands until it is moved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_s = 1000.0
        self.text = io.StringIO()
        self.outcomes: list[str] = []
        self.store_failures = 0
        self.node = self.restart()

    def restart(self) -> Node:
        self.node = Node(
            Store(self.folder), Log(self.text), self, "/opt/valve/1", Timing(), lambda: self.now_s,
            lambda: self.now_s,
        )  # fmt: skip
        return self.node

    def allocated(self, _resource: str, outcome: str) -> None:
        self.outcomes.append(outcome)

    def store_failed(self) -> None:
        self.store_failures += 1

    def healthy(self, resource: str) -> list[str]:
        return [device.id for device in self.node.devices(resource)[1] if device.healthy]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.text.getvalue().splitlines()]
        return [line for line in lines if line["event"] == name]


def report(name: str, units: int, lendable: int, online: int = 0) -> Report:
    return Report(name, units * GIB, lendable * GIB, online)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_list_has_a_new_version_only_when_it_differs(rig: Rig) -> None:
    rig.node.observe([report("A", 4, 2)])
    version, devices = rig.node.devices(RESOURCE_OFFLINE_MEMORY)
    rig.node.observe([report("A", 4, 2, online=3)])
    assert rig.node.devices(RESOURCE_OFFLINE_MEMORY) == (version, devices)
    rig.node.observe([report("A", 4, 1)])
    assert rig.node.devices(RESOURCE_OFFLINE_MEMORY)[0] == version + 1


def test_gpus_outlive_a_restart_and_what_was_lent_does_not(rig: Rig) -> None:
    rig.node.observe([report("A", 4, 3)])
    rig.restart()
    assert rig.healthy(RESOURCE_ONLINE_GPU) == ["A-seat"]
    assert len(rig.node.devices(RESOURCE_OFFLINE_MEMORY)[1]) == 4
    assert rig.healthy(RESOURCE_OFFLINE_MEMORY) == []


def test_a_gpu_that_its_agent_has_lost(rig: Rig) -> None:
    """Its seat is not to be had; where somebody uses it, it stays listed; else it goes."""
    rig.node.observe([report("A", 2, 2), report("B", 2, 2)])
    rig.node.allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"B-0000"}))
    rig.node.observe([report("A", 2, 2)])
    assert rig.healthy(RESOURCE_ONLINE_GPU) == ["A-seat"]
    assert rig.healthy(RESOURCE_OFFLINE_MEMORY) == ["A-0000", "A-0001", "B-0000"]
    listing = {(RESOURCE_OFFLINE_MEMORY, ContainerName("n", "p", "c")): frozenset({"A-0000"})}
    for _ in range(2):
        rig.now_s += 31
        rig.node.reconcile(listing, may_release=True)
    rig.node.observe([report("A", 2, 2)])
    assert [d.id for d in rig.node.devices(RESOURCE_ONLINE_GPU)[1]] == ["A-seat"]


def test_ids_that_come_again_have_not_been_absent(rig: Rig) -> None:
    """Their pod ended unseen, the next one got the same ids, and the kubelet does not list it yet."""
    rig.node.observe([report("A", 2, 2)])
    for patience_s in (20, 20, 31):
        rig.node.allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"A-0000"}))
        assert not rig.node.reconcile({}, may_release=True).released
        rig.now_s += patience_s
    assert len(rig.node.reconcile({}, may_release=True).released) == 1


def test_time_alone_ends_what_is_lent(rig: Rig) -> None:
    rig.node.observe([report("A", 4, 4)])
    rig.now_s += 31
    rig.node.tick()
    assert rig.healthy(RESOURCE_OFFLINE_MEMORY) == []
    assert rig.healthy(RESOURCE_ONLINE_GPU) == ["A-seat"]


@pytest.mark.parametrize(
    ("description", "text"),
    [
        ("not JSON", "{"),
        ("another schema", '{"schema": "valve.io/allocations/v9"}'),
        (
            "not whole",
            '{"schema": "valve.io/allocations/v1", "revision": 1, "gpus": [], "allocations": [{}]}',
        ),
        ("not an object", "[]"),
    ],
)
def test_a_ledger_that_cannot_be_read_is_kept_aside(tmp_path: Path, description: str, text: str) -> None:
    (tmp_path / "allocations.json").write_text(text)
    rig = Rig(tmp_path)
    rig.node.observe([report("A", 4, 4)])
    assert (tmp_path / "allocations.unreadable").read_text() == text, description
    assert len(rig.events("ledger-unreadable")) == 1
    json.loads((tmp_path / "allocations.json").read_text())


def test_a_disk_that_refuses_is_no_reason_to_fail(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once and counted every time; written when it can be again."""
    rig.node.observe([report("A", 4, 4)])
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    for token in ("A-0000", "A-0001"):
        assert rig.node.allocate(RESOURCE_OFFLINE_MEMORY, frozenset({token})) is not None
    assert rig.store_failures == 2
    assert [event["level"] for event in rig.events("ledger-write")] == ["error"]
    monkeypatch.undo()
    rig.node.allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"A-0002"}))
    assert [event["state"] for event in rig.events("ledger-write")][1:] == ["ok"]
    assert len(json.loads((rig.folder / "allocations.json").read_text())["allocations"]) == 3


def test_outcomes_are_counted(rig: Rig) -> None:
    rig.node.observe([report("A", 4, 4), report("B", 4, 4)])
    allocate = rig.node.allocate
    allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"A-0000"}))
    allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"A-0000"}))
    allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"A-0001", "B-0000"}))
    allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"A-0002", "A-0003", "B-0001", "B-0002", "B-0003"}))
    assert rig.outcomes == ["ok", "repeated", "remapped", "short"]


def test_foreign_ids_are_refused(rig: Rig) -> None:
    rig.node.observe([report("A", 4, 4)])
    assert rig.node.allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"C-0000"})) is None
    assert rig.outcomes == []


def test_a_seat_makes_its_gpu_an_online_one(rig: Rig) -> None:
    """Even before the agent has seen a process of it: offline goes beside it."""
    rig.node.observe([report("A", 4, 4), report("B", 4, 4)])
    rig.node.allocate(RESOURCE_ONLINE_GPU, frozenset({"B-seat"}))
    free = [f"{name}-{index:04d}" for name in "AB" for index in range(4)]
    assert rig.node.prefer(RESOURCE_OFFLINE_MEMORY, free, [], 2) == ["B-0000", "B-0001"]


def test_libraries_in_use(rig: Rig) -> None:
    rig.node.observe([report("A", 4, 4)])
    rig.node.allocate(RESOURCE_OFFLINE_MEMORY, frozenset({"A-0000"}))
    rig.node = Node(Store(rig.folder), Log(rig.text), rig, "/opt/valve/2", Timing(), lambda: 0.0, lambda: 0.0)
    assert rig.node.libraries() == {"/opt/valve/1", "/opt/valve/2"}
