# SPDX-License-Identifier: Apache-2.0
"""Who may run: offline stops when online is busy and goes on after T_cool, seen from outside by CPU time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from live import runs

from valve_cli.bench.rig import LiveAgent, LiveTenant, valve_run, wait_for


def test_offline_stops_while_online_is_busy(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    offline, online = start("offline", "off"), start("online", "on")
    offline.ask("spin", threads=2)
    wait_for("offline to run", lambda: runs(offline.pid))
    online.ask("busy")
    agent.wait_event("pause")
    assert not runs(offline.pid)
    assert agent.status()["offline_paused"]
    idle_at_ns = time.monotonic_ns()
    online.ask("idle", decode_gap_ns=75_000_000)
    resume = agent.wait_event("resume", after=len(agent.events("resume")))
    assert resume["t_ns"] - idle_at_ns >= 150_000_000, "T_cool is twice the longest decode gap"
    assert runs(offline.pid)


def test_one_preemption_per_busy_period(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    offline, online = start("offline", "off"), start("online", "on")
    offline.ask("spin", threads=1)
    wait_for("offline to run", lambda: runs(offline.pid))
    resumes = len(agent.events("resume"))
    for _ in range(5):  # repeated reports of the same state change nothing
        online.ask("busy")
    agent.wait_event("pause")
    for _ in range(5):
        online.ask("idle")
    agent.wait_event("resume", after=resumes)
    assert agent.status()["gate"]["pauses"] == 1


def test_processes_that_never_connect_are_stopped_too(
    agent: LiveAgent, start: Callable[..., LiveTenant], runtime: Path, tmp_path: Path
) -> None:
    """A child without libvalve (its environment is empty) computes as well, so the slow scan must find it."""
    online = start("online", "on")
    marker = tmp_path / "pid"
    script = f"env -i sh -c 'echo $$ > {marker}; while :; do :; done'"
    launcher = subprocess.Popen(valve_run(agent.socket, runtime, "offline", "", ["sh", "-c", script]))
    try:
        pid = int(wait_for("the child to start", lambda: marker.exists() and marker.read_text().strip()))
        wait_for("it to run", lambda: runs(pid))
        online.ask("busy")
        wait_for("the scan to find it", lambda: not runs(pid, 0.2))
        online.ask("idle")
        wait_for("it to go on", lambda: runs(pid))
    finally:
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(20) == 128 + signal.SIGTERM


def test_offline_goes_on_when_a_busy_online_engine_is_killed(
    agent: LiveAgent, start: Callable[..., LiveTenant]
) -> None:
    offline, online = start("offline", "off"), start("online", "on")
    offline.ask("spin", threads=1)
    wait_for("offline to run", lambda: runs(offline.pid))
    online.ask("busy")
    agent.wait_event("pause")
    assert not runs(offline.pid, 0.1)
    online.kill()
    wait_for("offline to go on", lambda: runs(offline.pid))


def test_somebody_else_continues_a_paused_process(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    offline, online = start("offline", "off"), start("online", "on")
    offline.ask("spin", threads=1)
    wait_for("offline to run", lambda: runs(offline.pid))
    online.ask("busy")
    agent.wait_event("pause")
    os.kill(offline.pid, signal.SIGCONT)
    agent.wait_event("violation")
    assert not runs(offline.pid)
