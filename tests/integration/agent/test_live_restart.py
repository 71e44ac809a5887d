# SPDX-License-Identifier: Apache-2.0
"""The agent is killed with -9 and started again: offline stops within the lease, online notices nothing, and
nobody has to be restarted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from live import SLAB_BYTES, SLABS, cpu_ticks, fill_and_own, hold, runs

from valve_agent.identity import children_of
from valve_cli.bench.rig import LiveAgent, LiveTenant, wait_for


def test_kill_9_of_the_agent_and_a_new_one(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    offline, online = start("offline", "off", slabs=60), start("online", "on", slabs=SLABS)
    held = hold(offline, 40)
    fill_and_own(offline, held, 0x42, requests=4, pinned=[])
    mine = online.ask("take", slabs=10)["held"]
    online.ask("fill", slabs=mine, byte=0x24)
    offline.ask("spin", threads=1)
    wait_for("offline to run", lambda: runs(offline.pid))

    agent.kill()
    wait_for("offline to stop", lambda: not runs(offline.pid, 0.1))
    before = cpu_ticks(offline.pid)
    # Online goes on with what it owns: it can be busy, idle and use its memory.
    online.ask("busy")
    assert set(online.ask("check", slabs=mine)["bytes"].values()) == {0x24}
    online.ask("idle")
    online.ask("busy")
    time.sleep(0.3)
    assert cpu_ticks(offline.pid) == before, "offline stays stopped without an agent"

    agent.start()
    wait_for("both to be back", lambda: set(agent.status()["tenants"]) == {"off", "on"})
    wait_for("both arenas", lambda: len(agent.events("restore")) == 2)
    slabs = {name: tenant["held_slabs"] for name, tenant in agent.status()["tenants"].items()}
    assert slabs == {"off": 40, "on": 10}
    assert agent.status()["slabs"]["free"] == SLABS - 50
    time.sleep(1.0)
    assert cpu_ticks(offline.pid) == before, "the restarted agent learned that online is busy"
    online.ask("idle")
    wait_for("offline to go on", lambda: runs(offline.pid))
    assert set(offline.ask("check", slabs=held)["bytes"].values()) == {0x42}
    assert offline.ask("poll")["lost"] == []
    # And memory moves again.
    online.ask("busy")
    assert len(online.ask("take", slabs=30)["held"]) == 30
    event = agent.wait_event("reclaim")
    assert event["bytes_in_use"] == event["slabs"] * SLAB_BYTES


def test_a_clean_stop_also_pauses_offline(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    offline = start("offline", "off")
    offline.ask("spin", threads=1)
    wait_for("offline to run", lambda: runs(offline.pid))
    assert agent.stop() == 0
    assert not agent.socket.exists()
    wait_for("offline to stop", lambda: not runs(offline.pid, 0.1))
    assert not runs(offline.pid)
    agent.start()
    wait_for("offline to go on", lambda: runs(offline.pid))


def test_the_agent_ends_when_its_gate_is_killed(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    """Without a gate nobody pauses: the agent must not pretend. Offline stops itself."""
    offline = start("offline", "off")
    offline.ask("spin", threads=1)
    wait_for("offline to run", lambda: runs(offline.pid))
    (gate,) = children_of(agent.pid)
    os.kill(gate, signal.SIGKILL)
    assert agent.wait() == 1
    assert "gate" in agent.events("failed")[0]["why"]
    wait_for("offline to stop", lambda: not runs(offline.pid, 0.1))
    assert not runs(offline.pid)
