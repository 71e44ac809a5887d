# SPDX-License-Identifier: Apache-2.0
"""New settings for an agent that runs.

Why it exists: a policy is changed while engines serve; cooldowns, reservation, limits and guardrails follow
at once and no tenant notices. What cannot follow is the device's geometry: arenas are made of slabs, so a new
slab size or device size waits until nobody holds an arena, and then the agent starts anew.

Threading model: the server thread. Caller: kube/node.py.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from valve_agent.gate import GateSettings
from valve_api.settings import EffectiveSettings

if TYPE_CHECKING:
    from valve_agent.agent import Agent


class LiveGate(Protocol):
    def change(self, settings: GateSettings) -> None: ...


def gate_settings(settings: EffectiveSettings) -> GateSettings:
    return GateSettings(
        cooldown_factor=settings.cooldown_factor,
        cooldown_min_ns=settings.cooldown_min_ns,
        cooldown_max_ns=settings.cooldown_max_ns,
        recovery_grace_ns=settings.recovery_grace_ns,
        lease_ns=settings.lease_ns,
        kill_after_ns=settings.pause_timeout_ns,
    )


def needs_restart(now: EffectiveSettings, wanted: EffectiveSettings) -> str:
    """What about `wanted` a running agent cannot take on, as a sentence's subject; "" if nothing."""
    changed = [
        name
        for name, a, b in (
            ("memory.slabSize", now.slab_bytes, wanted.slab_bytes),
            ("the device's memory", now.device_bytes, wanted.device_bytes),
            ("compute.route", now.route, wanted.route),
        )
        if a != b
    ]
    return " and ".join(changed)


def holds_memory(agent: Agent) -> bool:
    return any(process.memory is not None for process in agent.registry.processes.values())


def apply(agent: Agent, gate: LiveGate, wanted: EffectiveSettings) -> None:
    """Everything but what needs_restart names takes effect. Raises GateError."""
    kept = agent.settings
    settings = replace(
        wanted, slab_bytes=kept.slab_bytes, slabs=kept.slabs, device_bytes=kept.device_bytes,
        arena_slabs=kept.arena_slabs, route=kept.route,
    ) if needs_restart(kept, wanted) else wanted  # fmt: skip
    reservation = settings.reservation
    if needs_restart(kept, wanted):  # its slabs are counted in another size
        reservation = kept.reservation
        settings = replace(settings, reservation=reservation, online_floor_slabs=kept.online_floor_slabs)
    gate.change(gate_settings(settings))
    agent.pool.change(
        max_reclaims_per_minute=settings.max_reclaims_per_minute,
        online_floor_slabs=settings.online_floor_slabs,
    )
    agent.pool.reservation.change(
        min_slabs=reservation.min_slabs,
        max_slabs=reservation.max_slabs,
        increase_factor=reservation.factor,
        decrease_slabs=reservation.decrease_slabs,
        quiet_period_ns=reservation.quiet_ns,
        now=time.monotonic_ns(),
    )
    agent.settings = settings
    agent.pool.settle()
