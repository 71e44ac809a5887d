# SPDX-License-Identifier: Apache-2.0
"""After `pause` returned nothing of the process executes: shown from outside, by its counters and CPU time.

The victim has two threads that count in shared memory as fast as they can, and 44 that sleep.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from gate_rig import Victim

from valve_agent.devices.base import PauseTimeout, TargetRefused
from valve_agent.devices.cpu.compute import CpuCompute, ProcessTarget

WATCH_S = 0.2
LEADERS = ["wait", "zombie", "vfork"]


@contextmanager
def controlled(compute: CpuCompute, victim: Victim) -> Iterator[ProcessTarget]:
    target = compute.open(victim.pid, os.pidfd_open(victim.pid), victim.barrier)
    yield target
    compute.close(target)


def wait_until_it_counts(victim: Victim) -> None:
    """Every spinning thread has counted since now."""
    before = victim.counters.read()
    deadline = time.monotonic() + 10
    while any(now == then for now, then in zip(victim.counters.read(), before, strict=True)):
        assert time.monotonic() < deadline, "the victim does not run"
        time.sleep(0.0005)


def pause(compute: CpuCompute, targets: Sequence[ProcessTarget]) -> None:
    """As the gate does: on a crowded machine an attempt may end before the last thread had its turn."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return compute.pause(targets)
        except PauseTimeout:
            assert time.monotonic() < deadline, "it never stopped"


def moved_in(victim: Victim, seconds: float) -> bool:
    before = victim.counters.read()
    time.sleep(seconds)
    return victim.counters.read() != before


@pytest.mark.parametrize("barrier", [True, False], ids=["barrier", "thread by thread"])
@pytest.mark.parametrize("leader", LEADERS)
def test_nothing_executes_after_pause(
    start_victims: Callable[..., Victim], leader: str, barrier: bool
) -> None:
    victim = start_victims(leader, barrier)
    compute = CpuCompute()
    with controlled(compute, victim) as target:
        wait_until_it_counts(victim)
        cpu_at_start_ns = victim.cpu_ns()
        time.sleep(WATCH_S)
        control_ns = victim.cpu_ns() - cpu_at_start_ns
        pause(compute, [target])
        counted = victim.counters.read()
        cpu_at_pause_ns = victim.cpu_ns()
        assert not moved_in(victim, WATCH_S)
        assert victim.counters.read() == counted
        # Threads that were still on their way into the stop may use kernel time for it, once.
        assert victim.cpu_ns() - cpu_at_pause_ns < control_ns / 10
        assert victim.process.poll() is None
        assert list(compute.running([target])) == []
        compute.resume([target])
        wait_until_it_counts(victim)
        assert list(compute.running([target])) == [target]


@pytest.mark.parametrize(
    ("leader", "barrier", "cycles"),
    [("wait", True, 1000), ("wait", False, 200), ("zombie", True, 200), ("vfork", True, 200)],
)
def test_cycle_after_cycle(
    start_victims: Callable[..., Victim], leader: str, barrier: bool, cycles: int
) -> None:
    victim = start_victims(leader, barrier)
    compute = CpuCompute()
    with controlled(compute, victim) as target:
        for cycle in range(cycles):
            wait_until_it_counts(victim)
            pause(compute, [target])
            assert not moved_in(victim, 0.001), f"cycle {cycle}: it executed after pause returned"
            compute.resume([target])


@pytest.mark.parametrize("witness", [True, False], ids=["witness", "every thread"])
def test_a_leader_that_gets_no_cpu_is_not_waited_for(
    start_victims: Callable[..., Victim], witness: bool
) -> None:
    """It shares a CPU with a busy process and has the least right to it, so it cannot reach T soon."""
    victim = start_victims("wait")
    compute = CpuCompute()
    cpu = min(os.sched_getaffinity(0))
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(hog.pid, {cpu})
        os.sched_setaffinity(victim.pid, {cpu})  # the leader; the counting threads run where they like
        os.sched_setscheduler(victim.pid, os.SCHED_IDLE, os.sched_param(0))
        unstopped = 0
        with controlled(compute, victim) as target:
            for cycle in range(100):
                wait_until_it_counts(victim)
                if witness:
                    tend(compute, target)
                pause(compute, [target])
                unstopped += leader_state(victim) != "T"
                assert list(compute.running([target])) == [], "a flagged leader counts as running"
                assert not moved_in(victim, 0.001), f"cycle {cycle}: it executed after pause returned"
                compute.resume([target])
        assert unstopped > 0, "the leader always stopped in time: nothing was shown"
    finally:
        hog.kill()
        hog.wait()


def tend(compute: CpuCompute, target: ProcessTarget) -> None:
    """Until it has a witness: after a resume each thread needs a turn to fall asleep again."""
    deadline = time.monotonic() + 10
    while not target.witness:
        assert time.monotonic() < deadline, "none of 44 threads sleeps"
        compute.tend([target])


def leader_state(victim: Victim) -> str:
    stat = Path(f"/proc/{victim.pid}/task/{victim.pid}/stat").read_text()
    return stat[stat.rindex(")") + 2]


def test_the_check_has_power(start_victims: Callable[..., Victim]) -> None:
    """A pause that only sends the signal and does not wait is caught by the same look at the counters."""
    victim = start_victims()
    caught = 0
    for _ in range(300):
        wait_until_it_counts(victim)
        os.kill(victim.pid, signal.SIGSTOP)
        caught += moved_in(victim, 0.001)
        os.kill(victim.pid, signal.SIGCONT)
    assert caught > 0


def test_several_processes_are_stopped_together(start_victims: Callable[..., Victim]) -> None:
    victims = [start_victims("wait"), start_victims("zombie"), start_victims("wait", False)]
    compute = CpuCompute()
    targets = [compute.open(v.pid, os.pidfd_open(v.pid), v.barrier) for v in victims]
    pause(compute, targets)
    for victim in victims:
        assert not moved_in(victim, 0.05)
    compute.resume(targets)
    for victim, target in zip(victims, targets, strict=True):
        wait_until_it_counts(victim)
        compute.close(target)


def test_a_process_that_ends_counts_as_paused(start_victims: Callable[..., Victim]) -> None:
    victim, other = start_victims(), start_victims()
    compute = CpuCompute()
    with controlled(compute, victim) as target, controlled(compute, other) as other_target:
        victim.process.kill()
        compute.pause([target, other_target])
        victim.process.wait()
        compute.pause([target, other_target])
        assert compute.is_gone(target)
        assert not moved_in(other, 0.02)


def test_a_process_that_is_gone_cannot_be_opened(start_victims: Callable[..., Victim]) -> None:
    victim = start_victims()
    pidfd = os.pidfd_open(victim.pid)
    victim.process.kill()
    victim.process.wait()
    with pytest.raises(TargetRefused, match=str(victim.pid)):
        CpuCompute().open(victim.pid, pidfd, True)
    os.close(pidfd)


def test_a_name_with_brackets_is_read_right(
    start_victims: Callable[..., Victim], victim_binary: Path, tmp_path: Path
) -> None:
    """The state stands after the name, and a name may contain anything."""
    victim = start_victims(binary=shutil.copy(victim_binary, tmp_path / ") T (x) R)"))
    assert Path(f"/proc/{victim.pid}/comm").read_text() == ") T (x) R)\n"
    compute = CpuCompute()
    with controlled(compute, victim) as target:
        assert list(compute.running([target])) == [target]
        compute.pause([target])
        assert not moved_in(victim, 0.02)
