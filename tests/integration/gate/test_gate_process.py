# SPDX-License-Identifier: Apache-2.0
"""The gate as a process of its own, through the handle that main uses."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gate_rig import SETTINGS, Rig, Victim

from valve_agent.gate_link import GateDied, GateError, GateHandle, HoldTimeout
from valve_agent.shared import Gate as GateState
from valve_agent.shared import Page

ROOT = Path(__file__).resolve().parents[3]


def ring(rig: Rig, page: Page, busy: bool) -> None:
    page._at.busy_since_ns = time.monotonic_ns()
    page._at.busy_seq += 1
    page._at.busy = int(busy)
    os.eventfd_write(rig.handle.doorbell_fd, 1)


def next_event(rig: Rig, name: str, timeout_s: float = 10) -> dict[str, Any]:
    """The next event of this name; others before it are dropped."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        select.select([rig.handle], [], [], 0.1)
        for event in rig.handle.read_events():
            if event["event"] == name:
                return event
    pytest.fail(f"no {name} event came")


def runs(victim: Victim) -> bool:
    before = victim.counters.read()
    time.sleep(0.05)
    return victim.counters.read() != before


def test_busy_stops_offline_and_idle_lets_it_go_on(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    victim, page = start_victims(), rig.engine(1)
    rig.target(2, victim)
    assert runs(victim)
    for _ in range(20):
        ring(rig, page, True)
        pause = next_event(rig, "pause")
        assert not runs(victim)
        assert pause["reason"] == "busy"
        assert pause["t_ns"] - page.busy_since_ns == round(pause["latency_us"] * 1000)
        ring(rig, page, False)
        next_event(rig, "resume")
    assert runs(victim)
    stats = rig.handle.stats()
    assert stats.counters["samples"] == stats.counters["pauses"] == len(stats.latency_ns) == 20


def test_attach_while_closed_is_paused_at_once(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    page = rig.engine(1)
    ring(rig, page, True)
    victim = start_victims()
    rig.target(2, victim)
    assert not runs(victim)


def test_a_hold_from_another_thread_while_main_works(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    victims = [start_victims(), start_victims()]
    rig.target(2, victims[0])
    held = threading.Event()
    over = threading.Event()

    def reclaim() -> None:
        for _ in range(20):
            rig.handle.hold(5)
            rig.handle.release()
        rig.handle.hold(5)
        held.set()
        over.wait(30)
        rig.handle.release()

    thread = threading.Thread(target=reclaim)
    thread.start()
    for conn in range(3, 10):
        rig.target(conn, victims[1])
        rig.handle.remove(conn)
    rig.target(10, victims[1])
    assert held.wait(30)
    assert not runs(victims[0])
    assert not runs(victims[1])
    over.set()
    thread.join()
    next_event(rig, "resume")
    assert runs(victims[0])
    assert runs(victims[1])


def test_release_without_hold_is_refused(rig: Rig) -> None:
    with pytest.raises(GateError, match="without a hold"):
        rig.handle.release()


def test_a_hold_that_comes_too_late_is_withdrawn(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    victim = start_victims()
    rig.target(2, victim)
    os.kill(rig.handle.pid, signal.SIGSTOP)  # a gate that does not answer
    with pytest.raises(HoldTimeout, match="not evicted within"):
        rig.handle.hold(0.05)
    os.kill(rig.handle.pid, signal.SIGCONT)
    rig.handle.hold(10)
    assert not runs(victim)
    rig.handle.release()
    next_event(rig, "resume")
    assert runs(victim)


def test_a_quick_hold_does_not_wait_for_a_slow_one(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    rig.target(2, start_victims())
    os.kill(rig.handle.pid, signal.SIGSTOP)
    slow = threading.Thread(target=lambda: rig.handle.hold(60))
    slow.start()
    while not rig.handle._hold_lock.locked():
        time.sleep(0.001)
    with pytest.raises(HoldTimeout, match="another hold"):
        rig.handle.hold(0.01)
    assert slow.is_alive()
    os.kill(rig.handle.pid, signal.SIGCONT)
    slow.join()
    rig.handle.release()


def test_somebody_continues_a_paused_process(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    victim = start_victims()
    rig.target(2, victim)
    rig.handle.hold(10)
    os.kill(victim.pid, signal.SIGCONT)
    assert next_event(rig, "violation")["pids"] == [victim.pid]
    assert not runs(victim)
    assert rig.handle.stats().counters["violations"] == 1
    rig.handle.release()


def test_a_process_that_is_continued_again_and_again_is_killed(
    rig: Rig, start_victims: Callable[..., Victim]
) -> None:
    victim = start_victims()
    rig.target(2, victim)
    rig.handle.hold(10)
    deadline = time.monotonic() + 30
    while victim.process.poll() is None and time.monotonic() < deadline:
        os.kill(victim.pid, signal.SIGCONT)
        time.sleep(0.01)
    assert victim.process.returncode == -signal.SIGKILL
    assert str(victim.pid) in next_event(rig, "kill")["why"]
    rig.handle.release()


def test_a_target_that_dies_is_dropped(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    victim, other = start_victims(), start_victims()
    rig.target(2, victim)
    rig.target(3, other)
    victim.process.kill()
    victim.process.wait()
    assert next_event(rig, "target_gone")["pid"] == victim.pid
    rig.handle.hold(10)
    assert not runs(other)
    rig.handle.release()


def test_a_dead_process_is_refused(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    victim = start_victims()
    pidfd = os.pidfd_open(victim.pid)
    victim.process.kill()
    victim.process.wait()
    fd, page = Page.create()
    with pytest.raises(GateError, match="cannot be paused"):
        rig.handle.add_target(2, victim.pid, pidfd, fd, True)
    page.close()
    os.close(fd)
    os.close(pidfd)


def test_scanned_processes_obey_until_they_leave_the_set(
    rig: Rig, start_victims: Callable[..., Victim]
) -> None:
    victim = start_victims("wait", False)
    pidfd = os.pidfd_open(victim.pid)
    rig.handle.set_scanned({victim.pid: pidfd})
    rig.handle.hold(10)
    assert not runs(victim)
    rig.handle.set_scanned({})
    assert runs(victim)
    rig.handle.set_scanned({victim.pid: pidfd})
    assert not runs(victim)
    rig.target(2, victim)  # it connects after all
    rig.handle.set_scanned({})
    assert not runs(victim)
    rig.handle.release()
    next_event(rig, "resume")
    assert runs(victim)
    os.close(pidfd)


def test_a_disconnected_process_waits_for_its_return(rig: Rig, start_victims: Callable[..., Victim]) -> None:
    victim = start_victims()
    rig.target(2, victim)
    rig.handle.remove(2)
    assert not runs(victim)
    rig.handle.hold(10)
    rig.handle.release()
    next_event(rig, "resume")
    assert not runs(victim)
    rig.target(3, victim)
    assert runs(victim)


def test_the_heartbeat_beats_several_times_per_lease(rig: Rig) -> None:
    page = rig.engine(1)
    beats = {page.heartbeat_ns}
    deadline = time.monotonic() + 30
    while len(beats) < 10 and time.monotonic() < deadline:
        beats.add(page.heartbeat_ns)
        time.sleep(0.005)
    order = sorted(beats)
    gaps_ns = sorted(after - before for before, after in pairwise(order))
    assert gaps_ns[len(gaps_ns) // 2] < SETTINGS.lease_ns / 2
    assert page.gate == GateState.OPEN


def test_a_gate_that_ends_leaves_offline_paused(start_victims: Callable[..., Victim]) -> None:
    rig = Rig(SETTINGS)
    victim = start_victims()
    rig.target(2, victim)
    assert runs(victim)
    rig.close()
    assert not runs(victim)


def test_a_gate_whose_main_is_killed_pauses_and_ends(
    start_victims: Callable[..., Victim], tmp_path: Path
) -> None:
    victim = start_victims()
    script = tmp_path / "main.py"
    script.write_text(f"""
import os, sys, time
from valve_agent.gate_link import GateHandle, GateSettings
from valve_agent.shared import Page
gate = GateHandle.start("cpu", GateSettings(recovery_grace_ns=0))
page_fd, page = Page.create()
gate.add_target(2, {victim.pid}, os.pidfd_open({victim.pid}), page_fd, True)
print(gate.pid, flush=True)
time.sleep(600)
""")
    main = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert main.stdout is not None
    gate_pid = int(main.stdout.readline())
    gate_pidfd = os.pidfd_open(gate_pid)
    assert runs(victim)
    main.kill()
    main.wait()
    main.stdout.close()
    assert select.select([gate_pidfd], [], [], 10)[0], "the gate outlived its main"
    os.close(gate_pidfd)
    assert not runs(victim)


def test_calls_after_the_gate_died_say_so(rig: Rig) -> None:
    os.kill(rig.handle.pid, signal.SIGKILL)

    def read_what_is_left() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            assert select.select([rig.handle], [], [], 10)[0], "its end wakes main"
            rig.handle.read_events()

    for call in (read_what_is_left, lambda: rig.handle.remove(1), lambda: rig.handle.hold(1)):
        with pytest.raises(GateDied, match="Restart the agent"):
            call()


def test_an_unknown_device_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GateDied):
        GateHandle.start("tpu", SETTINGS)
    assert "there is no device 'tpu'" in capfd.readouterr().err


def test_the_gate_is_lean(rig: Rig) -> None:
    maps = Path(f"/proc/{rig.handle.pid}/maps").read_text()
    for module in ("pydantic", "prometheus"):
        assert module not in maps
    status = Path(f"/proc/{rig.handle.pid}/status").read_text()
    (threads,) = (line.split()[1] for line in status.splitlines() if line.startswith("Threads:"))
    assert threads == "1"
    (rss,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    assert rss < 32 * 1024
