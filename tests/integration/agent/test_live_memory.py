# SPDX-License-Identifier: Apache-2.0
"""Who has which memory: grants, limits, reclaim under use, and nobody sees another's bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from live import SLAB_BYTES, SLABS, fill_and_own, hold

from valve_agent.identity import children_of
from valve_cli.bench.rig import LiveAgent, LiveTenant, RigError, wait_for


def process_of(agent: LiveAgent, name: str) -> dict[str, Any]:
    return dict(agent.status()["tenants"][name]["processes"][0])


def test_reclaim_under_use_keeps_everything_else_intact(
    agent: LiveAgent, start: Callable[..., LiveTenant]
) -> None:
    offline, online = start("offline", "off", slabs=60), start("online", "on", slabs=SLABS)
    held = hold(offline, 60)
    pinned = held[:2]
    owned = fill_and_own(offline, held, 0x5A, requests=6, pinned=pinned)
    online.ask("busy")
    took = online.ask("take", slabs=30)
    assert len(took["held"]) == 30
    event = agent.wait_event("reclaim")
    assert event["bytes_in_use"] == event["bytes"] == event["slabs"] * SLAB_BYTES
    online.ask("fill", slabs=took["held"], byte=0xC3)
    assert agent.status()["slabs"]["free"] == agent.status()["slabs"]["reservation"]

    online.ask("idle")
    lost = offline.ask("poll")["lost"]
    assert len(lost) == event["slabs"]
    assert not set(lost) & set(pinned)
    whole = [slot for slot, slabs in owned.items() if not set(slabs) & set(lost)]
    assert event["requests_harmed"] == 6 - len(whole)
    assert len(whole) >= 1, "the greedy takes whole requests, it does not graze on all of them"
    kept = sorted(set(held) - set(lost))
    assert set(offline.ask("check", slabs=kept)["bytes"].values()) == {0x5A}
    # What was lost lies on the quarantine page: never what anybody wrote elsewhere.
    assert set(offline.ask("check", slabs=lost)["bytes"].values()) <= {0}
    assert set(online.ask("check", slabs=took["held"])["bytes"].values()) == {0xC3}
    assert process_of(agent, "off")["resident_bytes"] == len(kept) * SLAB_BYTES, "the pages are really gone"


def test_writes_to_lost_slabs_reach_nobody(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    offline, other = start("offline", "off", slabs=30), start("offline", "other", slabs=30)
    online = start("online", "on", slabs=SLABS)
    held, others = hold(offline, 30), hold(other, 30)
    fill_and_own(offline, held, 1, requests=3, pinned=[])
    fill_and_own(other, others, 2, requests=3, pinned=others)
    online.ask("busy")
    took = online.ask("take", slabs=20)["held"]
    online.ask("fill", slabs=took, byte=3)
    online.ask("idle")
    lost = offline.ask("poll")["lost"]
    assert lost
    offline.ask("fill", slabs=lost, byte=0xEE)
    assert set(online.ask("check", slabs=took)["bytes"].values()) == {3}
    assert set(other.ask("check", slabs=others)["bytes"].values()) == {2}
    assert process_of(agent, "off")["resident_bytes"] == (30 - len(lost)) * SLAB_BYTES


def test_reclaimed_memory_comes_back_empty(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    offline, online = start("offline", "off", slabs=60), start("online", "on", slabs=SLABS)
    fill_and_own(offline, hold(offline, 60), 0x77, requests=2, pinned=[])
    online.ask("busy")
    took = online.ask("take", slabs=SLABS)["held"]
    assert len(took) == SLABS
    assert set(online.ask("check", slabs=took)["bytes"].values()) == {0}
    online.ask("fill", slabs=took, byte=0x99)
    online.ask("want", slabs=0)
    online.ask("return", slabs=took)
    online.ask("idle")
    wait_for("offline to grow again", lambda: len(offline.ask("poll")["held"]) >= 40)
    again = offline.ask("poll")["held"]
    assert set(offline.ask("check", slabs=again)["bytes"].values()) == {0}


def test_an_offline_tenant_gets_no_more_than_its_limit(
    agent: LiveAgent, start: Callable[..., LiveTenant]
) -> None:
    offline = start("offline", "off", memory="20Mi")
    with pytest.raises(RigError, match=r"more than the 20Mi .*valve run --memory"):
        offline.ask("arena", slabs=11, slab_bytes=SLAB_BYTES)
    offline.ask("arena", slabs=10, slab_bytes=SLAB_BYTES)
    assert len(hold(offline, 10)) == 10
    assert agent.status()["tenants"]["off"]["limit_slabs"] == 10


def test_two_offline_tenants_share_evenly(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    first, second = start("offline", "a", slabs=60), start("offline", "b", slabs=60)
    hold(first, 20)
    second.ask("want", slabs=60)
    first.ask("want", slabs=60)
    wait_for("all to be given out", lambda: agent.status()["slabs"]["free"] <= 1)
    held = {name: tenant["held_slabs"] for name, tenant in agent.status()["tenants"].items()}
    assert held["a"] + held["b"] == SLABS - 1, "all but the reservation"


def test_a_killed_offline_process_gives_its_slabs_back(
    agent: LiveAgent, start: Callable[..., LiveTenant]
) -> None:
    offline = start("offline", "off", slabs=60)
    offline.ask("fill", slabs=hold(offline, 60), byte=1)
    assert agent.status()["slabs"]["free"] == 4
    offline.kill()
    wait_for("its slabs to be back", lambda: agent.status()["slabs"]["free"] == SLABS)
    assert agent.status()["tenants"] == {}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to open an arena behind libvalve's back")
def test_a_process_that_uses_more_than_granted_is_killed(
    agent: LiveAgent, start: Callable[..., LiveTenant]
) -> None:
    """It maps its own arena file behind libvalve's back and fills all of it."""
    offline = start("offline", "off", slabs=60)
    hold(offline, 4)
    offline.tell("overuse")
    assert offline.wait() == 128 + signal.SIGKILL
    event = agent.wait_event("kill")
    assert "were granted" in event["why"]
    wait_for("its slabs to be back", lambda: agent.status()["slabs"]["free"] == SLABS)


def test_a_victim_that_does_not_answer_is_killed(agent: LiveAgent, start: Callable[..., LiveTenant]) -> None:
    """Its helper is stopped, so it cannot remap; online gets the memory all the same."""
    offline, online = start("offline", "off", slabs=60), start("online", "on", slabs=SLABS)
    fill_and_own(offline, hold(offline, 60), 1, requests=2, pinned=[])
    (helper,) = children_of(offline.pid)
    os.kill(helper, signal.SIGSTOP)
    online.ask("busy")
    took = online.ask("take", slabs=30)
    assert len(took["held"]) == 30
    assert offline.wait() == 128 + signal.SIGKILL
    assert "in time" in agent.wait_event("kill")["why"]


def test_online_gets_what_is_free_at_once_and_never_more_than_the_device(
    agent: LiveAgent, start: Callable[..., LiveTenant]
) -> None:
    online = start("online", "on")
    with pytest.raises(RigError, match="more than the 128Mi"):
        online.ask("arena", slabs=SLABS + 1, slab_bytes=SLAB_BYTES)
    online.ask("arena", slabs=SLABS, slab_bytes=SLAB_BYTES)
    assert len(online.ask("take", slabs=SLABS)["held"]) == SLABS
    assert agent.events("reclaim") == []
