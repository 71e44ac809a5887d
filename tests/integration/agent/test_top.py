# SPDX-License-Identifier: Apache-2.0
"""`valve top` against a real agent with real tenants."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from live import SLAB_BYTES, SLABS, hold

from valve_cli.bench.rig import LiveAgent, LiveTenant


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "valve_cli.main", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_top_shows_who_has_what(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    offline, online = start("offline", "off", slabs=20), start("online", "on", slabs=10)
    hold(offline, 20)
    hold(online, 10)
    online.ask("busy")
    agent.wait_event("pause")
    done = top("--socket", str(agent.socket), "-o", "json")
    assert done.returncode == 0, done.stderr
    (device,) = json.loads(done.stdout)["devices"]
    assert device["paused"] is True
    assert device["memory_bytes"] == SLABS * SLAB_BYTES
    assert device["free_bytes"] == (SLABS - 30) * SLAB_BYTES
    states = {t["name"]: (t["workload"], t["busy"], t["memory_bytes"]) for t in device["tenants"]}
    assert states == {"on": ("online", True, 10 * SLAB_BYTES), "off": ("offline", False, 20 * SLAB_BYTES)}
    text = top("--socket", str(agent.socket), "--once").stdout
    assert "offline paused (on busy)" in text


def test_top_without_an_agent_says_what_to_do(tmp_path: Path) -> None:
    done = top("--socket", str(tmp_path / "none.sock"), "--once")
    assert done.returncode == 1
    assert "no agent listens" in done.stderr
    assert "Traceback" not in done.stderr
