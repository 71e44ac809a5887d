# SPDX-License-Identifier: Apache-2.0
"""New settings on an agent that runs: what follows at once, what waits, what never moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from valve_agent import live
from valve_agent.gate import GateSettings
from valve_agent.policy.gate import Action, GatePolicy
from valve_agent.policy.reservation import Reservation
from valve_api.settings import EffectiveSettings, ReservationSettings

MS, S = 1_000_000, 1_000_000_000
NOW = EffectiveSettings(
    policy="p", device_bytes=128 << 20, slab_bytes=2 << 20, slabs=64, arena_slabs=64, lease_ns=500 * MS,
    recovery_grace_ns=2 * S, pause_timeout_ns=1 * S, cooldown_factor=2.0, cooldown_min_ns=5 * MS,
    cooldown_max_ns=500 * MS, reservation=ReservationSettings(2, 20, 2.0, 1, 10 * S), online_floor_slabs=0,
    offline_default_bytes=64 << 20, offline_max_processes=16, unknown_processes="Report", route="auto",
    max_reclaims_per_minute=60,
)  # fmt: skip


class FakeAgent:
    """As much of an agent as settings touch; records what it is told."""

    def __init__(self) -> None:
        self.settings = NOW
        self.told: list[Any] = []
        self.pool = self
        self.reservation = Reservation(
            min_slabs=2, max_slabs=20, increase_factor=2.0, decrease_slabs=1, quiet_period_ns=10 * S, now_ns=0
        )
        self.settled = 0

    def change(self, settings: GateSettings | None = None, **limits: int) -> None:
        self.told.append(settings or limits)

    def settle(self) -> None:
        self.settled += 1


def apply(wanted: EffectiveSettings) -> FakeAgent:
    agent = FakeAgent()
    live.apply(agent, agent, wanted)  # type: ignore[arg-type]
    return agent


@pytest.mark.parametrize(
    ("description", "wanted", "needs"),
    [
        ("cooldown", replace(NOW, cooldown_factor=3.0), ""),
        ("reservation", replace(NOW, reservation=ReservationSettings(4, 30, 1.5, 2, S)), ""),
        ("slab size", replace(NOW, slab_bytes=4 << 20, slabs=32), "memory.slabSize"),
        ("device size", replace(NOW, device_bytes=256 << 20, slabs=128), "the device's memory"),
        ("both", replace(NOW, slab_bytes=4 << 20, device_bytes=256 << 20),
         "memory.slabSize and the device's memory"),
        ("route", replace(NOW, route="launch-gate"), "compute.route"),
    ],
)  # fmt: skip
def test_what_needs_a_restart(description: str, wanted: EffectiveSettings, needs: str) -> None:
    assert live.needs_restart(NOW, wanted) == needs


def test_everything_that_can_follow_does() -> None:
    wanted = replace(
        NOW, cooldown_min_ns=7 * MS, max_reclaims_per_minute=9, online_floor_slabs=5, lease_ns=300 * MS,
        reservation=ReservationSettings(4, 30, 1.5, 2, S),
    )  # fmt: skip
    agent = apply(wanted)
    gate, limits = agent.told
    assert (gate.cooldown_min_ns, gate.lease_ns) == (7 * MS, 300 * MS)
    assert limits == {"max_reclaims_per_minute": 9, "online_floor_slabs": 5}
    assert (agent.reservation.min_slabs, agent.reservation.max_slabs, agent.reservation.slabs) == (4, 30, 4)
    assert agent.settings == wanted
    assert agent.settled == 1, "what is free now is given out now"


def test_what_waits_for_a_restart_leaves_the_geometry_alone() -> None:
    wanted = replace(
        NOW, slab_bytes=4 << 20, slabs=32, arena_slabs=32, cooldown_factor=4.0, online_floor_slabs=3,
        reservation=ReservationSettings(1, 10, 2.0, 1, S),
    )  # fmt: skip
    agent = apply(wanted)
    assert (agent.settings.slab_bytes, agent.settings.slabs, agent.settings.arena_slabs) == (2 << 20, 64, 64)
    assert agent.settings.reservation == NOW.reservation, "its slabs are of another size"
    assert agent.settings.online_floor_slabs == NOW.online_floor_slabs
    assert agent.settings.cooldown_factor == 4.0, "the rest follows"


def test_a_reservation_moves_only_as_far_as_its_new_bounds_demand() -> None:
    reservation = Reservation(
        min_slabs=2, max_slabs=20, increase_factor=2.0, decrease_slabs=1, quiet_period_ns=10 * S, now_ns=0
    )
    reservation.on_shortfall(7, S)
    assert reservation.slabs == 9

    def change(least: int, most: int) -> int:
        return reservation.change(
            min_slabs=least, max_slabs=most, increase_factor=2.0, decrease_slabs=1, quiet_period_ns=10 * S,
            now=2 * S,
        )  # fmt: skip

    assert [change(1, 30), change(12, 30), change(1, 5)] == [9, 12, 5]
    with pytest.raises(ValueError, match="min <= max"):
        change(6, 5)
    assert (reservation.min_slabs, reservation.max_slabs, reservation.slabs) == (1, 5, 5)


def test_a_cooldown_that_runs_ends_as_it_began_and_the_next_one_is_new() -> None:
    policy = GatePolicy(2.0, 100 * MS, 100 * MS, 0, 0, offline_paused=False)

    def serve(at_ns: int) -> int:
        """One request; the wait after it, in ms."""
        policy.busy("e", at_ns)
        policy.idle("e", 0, at_ns + MS)
        deadline = policy.deadline_ns()
        assert deadline is not None
        return (deadline - at_ns - MS) // MS

    assert serve(0) == 100
    policy.set_cooldown(2.0, 10 * MS, 10 * MS)
    deadline = policy.deadline_ns()
    assert deadline == 101 * MS, "it was promised"
    assert policy.tick(101 * MS) is Action.RESUME
    assert serve(200 * MS) == 10
    with pytest.raises(ValueError, match="minimum <= maximum"):
        policy.set_cooldown(2.0, 5, 4)
