# SPDX-License-Identifier: Apache-2.0
"""Which route stops a process: the best that works, the next where it is refused, and back again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from gpu_tables import fill, table_fd

from valve_agent.devices.base import PauseTimeout
from valve_agent.devices.nvidia import routes
from valve_agent.devices.nvidia.compute import GpuTarget, NvidiaCompute
from valve_agent.devices.nvidia.plan import NotYet, Plan
from valve_agent.devices.nvidia.routes import GpuProcess, LaunchGateRoute
from valve_agent.devices.nvidia.table import GpuTable

LATE = NotYet("the control file has not arrived")
REFUSED = "the driver refuses"
Opens = Callable[..., tuple[NvidiaCompute, GpuTarget]]


class Scripted:
    """A route that answers as it is told and writes down what it was asked."""

    def __init__(self, name: str, log: list[str], stop: str | None = None, run: str | None = None) -> None:
        self.name, self.log, self.stops, self.runs = name, log, stop, run

    def stop(self, process: GpuProcess, everything: bool) -> str | None:
        self.log.append(f"{self.name} stops")
        return self.stops

    def run(self, process: GpuProcess) -> str | None:
        self.log.append(f"{self.name} runs")
        return self.runs

    def prepare(self, process: GpuProcess) -> Plan | None:
        return None


@pytest.fixture
def opens() -> Iterator[Opens]:
    """opens(routes...): a device with these, and a process of one channel on it."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    made: list[tuple[NvidiaCompute, GpuTarget]] = []

    def open_one(*allowed: Scripted) -> tuple[NvidiaCompute, GpuTarget]:
        compute = NvidiaCompute(allowed)
        target = compute.open(child.pid, os.pidfd_open(child.pid), False)
        fd = table_fd()
        table = GpuTable(fd)
        fill(table, (0, 1, 2, 10, 100, 1))
        table.close()
        compute.supply(target, -1, [fd, os.eventfd(0)])
        made.append((compute, target))
        return compute, target

    yield open_one
    for compute, target in made:
        compute.close(target)
    child.kill()
    child.communicate()


def said(compute: NvidiaCompute) -> list[object]:
    return [fields["route"] for event, fields in compute.notes() if event == "route"]


@pytest.mark.parametrize(
    ("what", "why", "at_last"),
    [("for a moment", LATE, routes.AGENT), ("for good", REFUSED, routes.IN_PROCESS)],
)
def test_a_route_that_failed_comes_back(opens: Opens, what: str, why: str, at_last: str) -> None:
    log: list[str] = []
    agent, other = Scripted(routes.AGENT, log, stop=why), Scripted(routes.IN_PROCESS, log)
    compute, target = opens(agent, other)
    compute.resume([target])
    assert said(compute) == [routes.AGENT]
    compute.pause([target])
    assert said(compute) == [routes.IN_PROCESS]
    agent.stops = None
    compute.resume([target])
    compute.pause([target])
    assert log[-1] == f"{at_last} stops", what
    assert said(compute) == ([routes.AGENT] if at_last == routes.AGENT else [])


def test_a_route_that_is_late_is_tried_until_it_works(opens: Opens) -> None:
    log: list[str] = []
    agent = Scripted(routes.AGENT, log, stop=LATE, run=LATE)
    compute, target = opens(agent, Scripted(routes.IN_PROCESS, log))
    compute.pause([target])
    compute.resume([target])
    for _ in range(3):
        assert compute.tend([target]) == []
    assert said(compute) == [routes.IN_PROCESS], "told once"
    agent.runs = None
    compute.tend([target])
    assert said(compute) == [routes.AGENT]
    log.clear()
    compute.tend([target])
    assert log == [], "it is proven"


def test_what_was_disabled_in_part_may_come_to_its_end(opens: Opens) -> None:
    """Launch-gate waits for launched work, which must not stand on a channel that stayed disabled."""
    log: list[str] = []
    gate = Scripted(routes.LAUNCH_GATE, log)
    compute, target = opens(Scripted(routes.AGENT, log, stop=REFUSED), gate)
    compute.pause([target])
    assert log == ["agent stops", "agent runs", "launch-gate stops"]


def test_what_nothing_stops_is_named(opens: Opens) -> None:
    compute, target = opens(Scripted(routes.AGENT, [], stop=REFUSED))
    with pytest.raises(PauseTimeout, match=REFUSED):
        compute.pause([target])


def test_an_answer_to_another_route_is_no_answer_to_launch_gate() -> None:
    fd = table_fd()
    table = GpuTable(fd)
    process = GpuProcess(table, fd)
    table._at.launch_hooks = 1
    table.route = routes.NUMBERS[routes.IN_PROCESS]
    process.command += 1
    table.order(process.command << 2 | routes.STOP_ALL)
    table._at.answered = table.command
    route = LaunchGateRoute()
    for _ in range(2):
        assert "still runs" in str(route.stop(process, True))
    table._at.answered = table.command
    assert route.stop(process, True) is None
    table.close()
    os.close(fd)
