# SPDX-License-Identifier: Apache-2.0
"""What a process may not do: each fault with its sentence, and the honest cases beside it."""

from __future__ import annotations

from typing import Any

import pytest

from valve_agent import watchdog
from valve_agent.pool import Holder
from valve_agent.registry import Link, Memory, Process, Tenant
from valve_agent.wire import Role

SLAB_BYTES = 1 << 21
NOW_NS = 100_000_000_000
UNUSED: Any = None


def process(
    role: Role = Role.OFFLINE, held: int = 0b111, connected: bool = True, lost_ns: int = 0
) -> Process:
    tenant = Tenant(1, "t", role, 10, 2, -1, 1)
    memory = Memory(UNUSED, -1, UNUSED, Holder(1, 1, "t", role, 10, 10, held))
    link = Link(1, -1, UNUSED, None) if connected else None
    return Process(7, -1, tenant, "engine", memory=memory, link=link, helper_pid=8, lost_ns=lost_ns)


@pytest.mark.parametrize(
    ("what", "subject", "resident_slabs", "sentence"),
    [
        ("all of what was granted", process(), 3, None),
        ("rounding", process(), 4, None),
        ("two slabs too many", process(), 5, "were granted"),
        ("nothing granted, much used", process(held=0), 2, "were granted"),
        ("online is told of, too", process(Role.ONLINE), 5, "were granted"),
        ("just disconnected", process(connected=False, lost_ns=NOW_NS - watchdog.LOST_NS), 3, None),
        ("gone for long, with memory", process(connected=False, lost_ns=0), 3, "not reconnected"),
        ("gone for long, all reclaimed", process(held=0, connected=False, lost_ns=0), 0, "not reconnected"),
        ("online is never told to come back", process(Role.ONLINE, connected=False, lost_ns=0), 3, None),
    ],
)
def test_memory(what: str, subject: Process, resident_slabs: int, sentence: str | None) -> None:
    fault = watchdog.fault_of_memory(subject, resident_slabs * SLAB_BYTES, SLAB_BYTES, NOW_NS)
    assert fault is None if sentence is None else sentence in str(fault)


@pytest.mark.parametrize(
    ("what", "looks", "guilty"),
    [
        ("an honest helper", [0.0, 0.01, 0.05], False),
        ("much before the first look says nothing", [90.0, 90.1], False),
        ("half a second within a second", [0.0, 0.2, 0.8], True),
        ("it is gone", [0.0, None, None], False),
    ],
)
def test_helper(monkeypatch: pytest.MonkeyPatch, what: str, looks: list[float | None], guilty: bool) -> None:
    subject = process()
    faults = []
    for look in looks:
        monkeypatch.setattr(watchdog, "cpu_s", lambda pid, look=look: look)
        faults.append(watchdog.fault_of_helper(subject))
    assert [fault is not None for fault in faults] == [False] * (len(looks) - 1) + [guilty]
