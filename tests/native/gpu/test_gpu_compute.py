# SPDX-License-Identifier: Apache-2.0
"""NvidiaCompute on a fake driver, call by call: what a pause disables, what a hold disables, what it says
when the driver refuses. The process that it controls is real and under libvalve; the test is its agent."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from gpu_captured import Captured
from gpu_node import VICTIM, advances, stands

import fakenv
from valve_agent import wire

ROOT = Path(__file__).resolve().parents[3]
GATE = f"""
import sys, os; sys.path.insert(0, {str(ROOT / "node_agent")!r})
from valve_agent.devices.base import PauseTimeout, TargetRefused
from valve_agent.devices.nvidia import compute as module
def said(call, *arguments):
    try: call(*arguments)
    except (PauseTimeout, TargetRefused) as error: return str(error)
"""


class Controlled:
    """A victim, and an actor in which NvidiaCompute controls it."""

    def __init__(self, captured: Captured, routes: str) -> None:
        self.captured = captured
        self.machine = captured.machine
        captured.run(VICTIM)
        self.gate = captured.machine.actor()
        self.gate.run(GATE + f"compute = module.parse({routes!r})")
        self.gate.run(
            f"target = compute.open({captured.actor.pid}, os.pidfd_open({captured.actor.pid}), False)"
        )
        self.give(-1, captured.table_fds)
        self.give_files()
        self.call("resume")

    def give(self, number: int, fds: list[int]) -> None:
        self.gate.run(f"compute.supply(target, {number}, list(fds))", fds=tuple(fds))

    def give_files(self) -> None:
        for number, (kind, fd) in self.captured.files.items():
            if kind == wire.GpuFileKind.CTL:
                self.give(number, [fd])

    def call(self, what: str) -> str | None:
        """The sentence of its exception, or None."""
        sentence: str | None = self.gate.run(f"result = said(compute.{what}, [target])")
        return sentence

    def notes(self) -> list[tuple[str, dict[str, Any]]]:
        text: str = self.gate.run("import json; result = json.dumps(compute.notes())")
        return [(name, fields) for name, fields in json.loads(text)]

    def disabled(self) -> list[int]:
        """Engines of the channels that are disabled."""
        return sorted(c["engine"] for c in self.machine.status()["channels"] if c["disabled"])

    def launch(self) -> None:
        self.captured.run("cu.launch('timer_writer', out, 60_000_000)")
        assert advances(self.captured.actor)


NewControlled = Callable[..., Controlled]


@pytest.fixture
def new_controlled(new_machine: fakenv.NewMachine, library: Path, tmp_path: Path) -> Iterator[NewControlled]:
    with ExitStack() as stack:

        def make(routes: str = "agent/none", **options: str) -> Controlled:
            captured = Captured(new_machine(**options), library, tmp_path, wire.Device.NVIDIA)
            stack.callback(captured.close)
            return Controlled(captured, routes)

        yield make


ALL = [1] * 8 + [9, 10]


@pytest.mark.parametrize("route", ["agent", "in-process"])
@pytest.mark.parametrize("branch", fakenv.LAYOUTS)
def test_a_pause_takes_compute_and_a_hold_takes_all(
    new_controlled: NewControlled, branch: str, route: str
) -> None:
    it = new_controlled(f"{route}/none", branch=branch)
    it.launch()
    assert it.disabled() == []
    assert it.call("pause") is None
    assert it.disabled() == [1] * 8
    assert stands(it.captured.actor)
    assert it.call("quiesce") is None
    assert it.disabled() == ALL
    assert it.call("pause") is None, "a weaker wish changes nothing"
    assert it.disabled() == ALL
    assert it.call("resume") is None
    assert it.disabled() == []
    assert advances(it.captured.actor)


@pytest.mark.parametrize("route", ["agent", "in-process"])
def test_more_channels_than_one_call_holds(new_controlled: NewControlled, route: str) -> None:
    """200 in one group on one subdevice: kernels of all four blocks of 64 stop, and each block comes back."""
    it = new_controlled(f"{route}/none", compute_channels="200")
    it.captured.run("""
        streams = [cu.stream() for _ in range(199)]  # stream k issues on channel k + 1
        clocks = [cu.host(4096) for _ in range(4)]
        for clock, channel in zip(clocks, (1, 70, 135, 199), strict=True):
            cu.launch('timer_writer', clock, 60_000_000, stream=streams[channel - 1])
        def stamps(): return [cu.read64(clock) for clock in clocks]
        """)

    def moving() -> list[bool]:
        before = it.captured.actor.run("result = stamps()")
        time.sleep(0.05)
        after = it.captured.actor.run("result = stamps()")
        return [a != b for a, b in zip(before, after, strict=True)]

    def all_move() -> bool:
        until = time.monotonic() + 20
        while not all(moving()):
            if time.monotonic() > until:
                return False
        return True

    def insist(what: str) -> None:
        """As the gate does: four kernels keep the helper from a core at times."""
        until = time.monotonic() + 20
        while (said := it.call(what)) is not None:
            assert time.monotonic() < until, said

    assert all_move()
    insist("pause")
    assert it.disabled() == [1] * 200
    assert moving() == [False] * 4, "no kernel in any block moves: the pause is proven by the kernels' stamps"
    insist("quiesce")
    assert it.disabled() == [1] * 200 + [9, 10]
    insist("resume")
    while it.disabled():  # a helper that was late is asked again, as with every heartbeat
        it.call("tend")
    assert all_move()


def test_a_pause_in_force_costs_no_call(new_controlled: NewControlled) -> None:
    it = new_controlled()
    assert it.call("pause") is None
    calls = it.machine.status()["calls"]
    for _ in range(20):
        assert it.call("pause") is None
    assert it.machine.status()["calls"] - calls < 20


def test_channels_made_between_two_looks_are_under_the_pause(new_controlled: NewControlled) -> None:
    it = new_controlled()
    it.gate.run("compute.tend([target])")
    it.captured.run(
        "more = [cu.stream() for _ in range(4)]; other = rm.Client(); tree = other.tree(channels=3)"
    )
    it.give_files()
    assert it.call("pause") is None
    left = [c for c in it.machine.status()["channels"] if c["engine"] == 1 and not c["disabled"]]
    assert left == []


def test_channels_freed_before_the_pause_do_not_break_it(new_controlled: NewControlled) -> None:
    it = new_controlled()
    it.captured.run("other = rm.Client(); tree = other.tree(channels=3)")
    it.give_files()
    it.gate.run("compute.tend([target])")
    it.captured.run("other.free(tree['channels'][1])")
    assert it.call("pause") is None
    assert it.disabled() == [1] * 10


def test_a_file_that_the_process_closed_is_closed_here_too(new_controlled: NewControlled) -> None:
    it = new_controlled()
    it.captured.run("other = rm.Client(); tree = other.tree(channels=3)")
    it.give_files()
    clients = len(it.machine.status()["clients"])
    number = max(it.captured.files)
    it.captured.run("os.close(other.fd)")
    assert it.captured.gone == [number]
    assert len(it.machine.status()["clients"]) == clients, "our descriptor keeps it alive"
    it.gate.run(f"import time; compute.withdraw(target, {number}); time.sleep(0.05)")
    assert len(it.machine.status()["clients"]) == clients - 1


@pytest.mark.parametrize(
    ("what", "routes", "rule", "sentences"),
    [
        ("permission denied", "agent/none", ("deny", "control", "0x2080110b", "0x1b"),
         ["a privilege is missing", "run the agent as root"]),
        ("a sandbox refuses", "agent/none", ("deny", "control", "0x2080110b", "0x56"),
         ["not supported here", "valve doctor"]),
        ("the firmware does not answer", "agent/none", ("deny", "control", "0x2080110b", "0x65"),
         ["did not answer in time", "see `dmesg` for an Xid"]),
        ("another client's file", "agent/none", ("deny", "control", "0x2080110b", "0x23"),
         ["belongs to another open file", "not the one that made the client"]),
        ("a status that nobody knows", "agent/none", ("deny", "control", "0x2080110b", "0x7e"),
         ["0x7e: see nvstatuscodes.h"]),
        ("the same, in the process", "in-process/none", ("deny", "control", "0x2080110b", "0x1b"),
         ["route in-process", "a privilege is missing"]),
        ("the commit step is refused", "agent/preempt", ("deny", "control", "0xa06c0105", "0x56"),
         ["not supported here"]),
    ],
)  # fmt: skip
def test_a_refusal_is_never_a_pause(
    new_controlled: NewControlled, what: str, routes: str, rule: tuple[str, ...], sentences: list[str]
) -> None:
    it = new_controlled(routes)
    it.launch()
    it.machine.ctl(*rule)
    said = it.call("pause")
    assert said is not None, what
    assert f"{it.captured.actor.pid} (" in said
    for sentence in sentences:
        assert sentence in said, said
    assert it.gate.run("result = [x.pid for x in compute.running([target])]") == [it.captured.actor.pid], (
        "the gate finds it to end it"
    )
    it.machine.ctl("clear")
    assert it.call("pause") is None
    assert stands(it.captured.actor)


def test_auto_falls_back_along_the_allowed_routes(new_controlled: NewControlled) -> None:
    it = new_controlled("agent,in-process,launch-gate/none")
    it.captured.run("cu.launch('spin_us', 1000); cu.synchronize()")
    it.notes()
    it.machine.ctl("deny", "control", "0x2080110b", "0x1b")
    assert it.call("pause") is None
    ((name, fields),) = [note for note in it.notes() if note[0] == "route"]
    assert (name, fields["route"]) == ("route", "launch-gate")
    assert "route in-process" in fields["why"]
    assert it.captured.at().route == wire.Route.LAUNCH_GATE
    assert it.disabled() == []


def test_a_channel_without_a_file_is_no_pause(new_controlled: NewControlled) -> None:
    it = new_controlled()
    it.gate.run("os.close(target.gpu.files.popitem()[1]); target.gpu.plan = None; target.stopped = -1")
    said = it.call("pause")
    assert said is not None
    assert "has not arrived" in said


def test_a_full_table_is_no_pause(new_controlled: NewControlled) -> None:
    it = new_controlled()
    it.captured.run("clients = [rm.Client() for _ in range(1)]; tree = clients[0].tree(channels=1015)")
    it.give_files()
    said = it.call("pause")
    assert said is not None
    assert "found no room in libvalve's table" in said


def test_launches_wait_while_the_driver_is_slow(new_controlled: NewControlled) -> None:
    """The hold comes before the driver's call: nothing new starts behind a lock that somebody else keeps."""
    it = new_controlled()
    it.captured.run("cu.launch('nop'); cu.synchronize()")
    it.machine.ctl("hold", 1000)
    it.gate.start("result = said(compute.pause, [target])")
    it.captured.frames(for_s=0.1)
    it.captured.actor.start("cu.launch('timer_writer', out, 2000); cu.synchronize()")
    assert it.captured.waits(0.2)
    assert it.gate.finish() is None
    assert it.captured.at().launches_held == 1
    assert [name for name, _ in it.notes() if name == "slow_driver"] == ["slow_driver"]
    assert it.call("resume") is None
    it.captured.finish()


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_dead_process_leaves_nothing(new_controlled: NewControlled, paused: bool) -> None:
    it = new_controlled()
    it.launch()
    if paused:
        assert it.call("pause") is None
    it.captured.close_descriptors()
    it.captured.actor.process.kill()
    it.captured.actor.process.wait()
    it.gate.run("import time; compute.close(target); time.sleep(0.1)")
    status = it.machine.status()
    assert status["channels"] == []
    assert status["used_bytes"] == [0]


@pytest.mark.parametrize("route", ["agent", "in-process"])
def test_a_dead_process_computes_no_more_though_a_child_has_its_files(
    new_controlled: NewControlled, route: str
) -> None:
    """A forked child (a data loader, say) keeps the driver's files open, so the driver frees nothing."""
    it = new_controlled(f"{route}/none")
    it.launch()
    it.captured.actor.start("""
        os.fork()  # the child waits for an agent to let it in
    """)
    child = it.captured.agent.accept()
    it.captured.close_descriptors()
    it.captured.actor.process.kill()
    it.captured.actor.process.wait()
    it.gate.run("compute.close(target)")
    assert it.disabled() == ALL, "the driver has them still, and none of them runs"
    os.kill(int(child.peer_pid), signal.SIGKILL)
    child.close()


def test_a_lost_gpu_counts_as_off(new_controlled: NewControlled) -> None:
    it = new_controlled()
    it.launch()
    it.machine.ctl("lost", 0, 1)
    assert it.call("pause") is None
    assert it.call("quiesce") is None


def test_the_agent_itself_is_refused(new_controlled: NewControlled) -> None:
    it = new_controlled()
    said = it.gate.run("result = said(compute.open, os.getpid(), os.pidfd_open(os.getpid()), False)")
    assert "is the agent itself" in said
