# SPDX-License-Identifier: Apache-2.0
"""What the gate asks of a device beside pause and resume: quiet memory before a hold is answered, descriptors
passed on, and an end for what cannot be controlled."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
from gate_bench import Bench, FakeTarget, set_busy

from valve_agent.gate import RETRY_NS


def actions(bench: Bench) -> list[str]:
    return [action for action, _ in bench.compute.log]


def hold(bench: Bench, token: int) -> None:
    bench.holds.send(marshal.dumps((True, token)))
    bench.turn()


def held(bench: Bench) -> list[int]:
    tokens = []
    while True:
        try:
            tokens.append(marshal.loads(bench.holds.recv(65536))[0])
        except BlockingIOError:
            return tokens


def test_a_hold_is_answered_when_nothing_touches_memory(bench: Bench) -> None:
    bench.target(2, pid=50)
    page = bench.engine(1)
    bench.compute.log.clear()
    set_busy(page, True)
    bench.ring()
    assert actions(bench) == ["pause"], "an online arrival does not wait for copies"
    bench.compute.copies_on = {50}
    hold(bench, 7)
    assert held(bench) == []
    assert actions(bench) == ["pause", "quiesce"]
    assert "pause_timeout" in [event["event"] for event in bench.events()]
    bench.compute.copies_on = set()
    time.sleep(2 * RETRY_NS / 1e9)
    bench.turn()
    assert held(bench) == [7]


def test_a_second_hold_asks_no_more_and_a_resume_forgets(bench: Bench) -> None:
    bench.target(2, pid=50)
    page = bench.engine(1, busy=True)
    hold(bench, 1)
    hold(bench, 2)
    assert held(bench) == [1, 2]
    assert actions(bench).count("quiesce") == 1
    for token in (1, 2):
        bench.holds.send(marshal.dumps((False, token)))
        bench.turn()
    set_busy(page, False)
    bench.ring()
    assert actions(bench)[-1] == "resume"
    set_busy(page, True)
    bench.ring()
    hold(bench, 3)
    assert actions(bench).count("quiesce") == 2


def test_who_comes_during_a_hold_is_quiet_too(bench: Bench) -> None:
    bench.engine(1, busy=True)
    hold(bench, 1)
    bench.compute.log.clear()
    bench.target(2, pid=50)
    assert actions(bench) == ["pause", "quiesce"]


@pytest.mark.parametrize(("what", "busy", "after"), [("open", False, "resume"), ("paused", True, "pause")])
def test_descriptors_are_passed_on_and_obey_at_once(bench: Bench, what: str, busy: bool, after: str) -> None:
    bench.target(2, pid=50)
    page = bench.engine(1)
    if busy:
        set_busy(page, True)
        bench.ring()
    bench.compute.log.clear()
    fd = os.open("/dev/null", os.O_RDONLY)
    before = set(os.listdir("/proc/self/fd"))
    assert bench.call("supply", (2, 3), fd) is None
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(fd)
    assert bench.compute.log == [("supply", (50, 3)), (after, (50,))], what
    assert bench.call("withdraw", (2, 3)) is None
    assert bench.compute.log[-1] == ("withdraw", (50, 3))


def test_descriptors_of_nobody_are_refused_and_closed(bench: Bench) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    before = set(os.listdir("/proc/self/fd"))
    answer = bench.call("supply", (9, 0), fd)
    assert answer is not None
    assert "belongs to no offline process" in answer
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def test_an_online_process_is_no_target(bench: Bench) -> None:
    bench.engine(1)
    fd, _ = bench.page()
    pidfd = os.pidfd_open(os.getpid())
    answer = bench.call("target", (2, 1001, False), pidfd, fd)
    assert answer == "process 1001 is online: it is never paused"
    os.close(pidfd)
    os.close(fd)


def test_notes_become_events(bench: Bench) -> None:
    bench.compute.to_tell = [("route", {"pid": 50, "route": "agent"})]
    bench.engine(1)
    said = [event for event in bench.events() if event["event"] == "route"]
    assert [(event["pid"], event["route"]) for event in said] == [(50, "agent")]


def child_target(bench: Bench) -> subprocess.Popen[bytes]:
    """A process of its own under the gate, over connection 2."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    fd, _ = bench.page()
    pidfd = os.pidfd_open(child.pid)
    assert bench.call("target", (2, child.pid, True), pidfd, fd) is None
    os.close(pidfd)
    os.close(fd)
    return child


def test_what_cannot_be_controlled_is_ended(bench: Bench) -> None:
    child = child_target(bench)
    bench.compute.uncontrollable = {child.pid}
    bench.gate._beat_every_ns = 1_000_000
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        bench.turn()
    assert child.wait(1) == -9
    killed = [event for event in bench.events() if event["event"] == "kill"]
    assert "cannot be controlled: no route" in killed[0]["why"]


def test_what_ends_between_the_look_and_the_kill_is_no_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent reaps it after the gate has seen it run: the signal finds nobody."""
    child = child_target(bench)
    bench.compute.refuses_to_stop = {child.pid}
    looks = 0

    def ends_meanwhile(targets: Sequence[FakeTarget]) -> Sequence[FakeTarget]:
        nonlocal looks
        looks += 1
        child.kill()
        child.wait()
        return targets

    monkeypatch.setattr(bench.compute, "running", ends_meanwhile)
    bench.engine(1, busy=True)
    deadline = time.monotonic() + 20
    while not looks and time.monotonic() < deadline:
        bench.turn()
    assert looks == 1
    bench.turn()
    said = [event["event"] for event in bench.events()]
    assert "kill" not in said, "it was not the gate that ended it"
    assert "target_gone" in said


def test_time_in_a_pause_is_no_time_out_of_control(bench: Bench) -> None:
    """Nobody tends a process while it is paused: its clock starts anew when it runs again."""
    child = child_target(bench)
    page = bench.engine(1)
    bench.gate._beat_every_ns = 1_000_000
    bench.compute.uncontrollable = {child.pid}
    for _ in range(3):
        time.sleep(0.002)
        bench.turn()
    set_busy(page, True)
    bench.ring()
    bench.compute.uncontrollable = set()
    time.sleep(0.1)  # twice the time that it is given
    set_busy(page, False)
    bench.ring()
    bench.compute.uncontrollable = {child.pid}
    time.sleep(0.002)
    bench.turn()
    assert child.poll() is None
    assert "kill" not in [event["event"] for event in bench.events()]
    child.kill()
    child.wait()


def test_one_that_cannot_be_stopped_leaves_no_other_running(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for conn, pid in ((2, 50), (3, 51), (4, 52)):
        bench.target(conn, pid)
    pause = bench.compute.pause

    def refuse(targets: Sequence[FakeTarget]) -> None:
        for target in targets:
            if target.pid == 51:
                raise PermissionError("it runs as another user")
            pause([target])

    monkeypatch.setattr(bench.compute, "pause", refuse)
    bench.engine(1)
    bench.compute.running_pids = {50, 51, 52}
    bench.control.close()
    bench.gate.run()
    assert bench.compute.running_pids == {51}
    assert "not paused: it runs as another user" in capsys.readouterr().err


def test_an_event_about_thousands_of_processes_fits_a_message(bench: Bench) -> None:
    bench.compute.to_tell = [("slow_driver", {"pids": list(range(100_000, 120_000)), "why": "x" * 100_000})]
    bench.engine(1)
    (said,) = [event for event in bench.events() if event["event"] == "slow_driver"]
    assert said["pids"][0] == 100_000
    assert said["why"].startswith("x")
