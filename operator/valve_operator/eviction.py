# SPDX-License-Identifier: Apache-2.0
"""Which starved offline pods move, and which nodes are starved. Pure; called by reconcile.

A pod moves only where that helps: its controller makes it again, and another node of Valve that is not
starved has room for it now. Never more than EVICTIONS_AT_ONCE pods are on their way, so that a fleet-wide
rush hour does not turn into a fleet-wide migration.

The scheduler does not know of starvation. Starved nodes carry the label valve.io/starved, and admission gives
every offline pod a preference against it, so the pod that takes the place of an evicted one goes elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from valve_operator.actions import EventNote, Evict
from valve_operator.selection import selects
from valve_operator.world import PodView, World

EVICTIONS_AT_ONCE: Final = 5


@dataclass(slots=True)
class Moves:
    """starved: nodes with an offline pod paused for too long. staying: policy → sentences, one per pod that
    ought to move and cannot."""

    starved: set[str] = field(default_factory=set)
    evictions: list[Evict] = field(default_factory=list)
    staying: dict[str, list[str]] = field(default_factory=dict)


def moves(world: World, held: Mapping[str, str], now_s: float) -> Moves:
    """held: node → policy. now_s: on the clock of world.paused."""
    found = Moves()
    over: list[tuple[float, str, str]] = []
    for node in world.paused.by_node:
        policy = world.policies.get(held.get(node, ""))
        if policy is None:
            continue
        for tenant, seconds in world.paused.longer_than(node, policy.starvation_delay_s, now_s):
            if tenant in world.pods:
                over.append((seconds, node, tenant))
                found.starved.add(node)
    if not over:
        return found
    room = _room(world, held, found.starved)
    places = EVICTIONS_AT_ONCE - sum(pod.leaving for pod in world.pods.values())
    for seconds, node, tenant in sorted(over, key=lambda entry: (-entry[0], entry[1:])):
        pod = world.pods[tenant]
        if pod.leaving or pod.node != node:
            continue
        if not pod.controller:
            _stays(found, held[node], pod, "has no controller that would make it again; run it from a Job")
            continue
        target = next((name for name in sorted(room) if _fits(world, pod, name, room[name])), "")
        if not target:
            _stays(found, held[node], pod, f"no other node has {pod.memory_gib} GiB of offline memory for it")
            continue
        if places <= 0:
            continue
        places -= 1
        room[target] -= pod.memory_gib
        text = (
            f"paused for {seconds:.0f}s without a break on {node}, where online is busy; evicted to move on"
        )
        found.evictions.append(Evict(pod.namespace, pod.name, pod.uid, EventNote("Normal", "Starved", text)))
    return found


def _room(world: World, held: Mapping[str, str], starved: set[str]) -> dict[str, int]:
    """GiB of offline memory that nobody asked for, on the nodes where a pod could go."""
    room = {
        name: node.offline_gib
        for name in held
        if (node := world.nodes.get(name)) and node.ready and node.schedulable and name not in starved
    }
    for pod in world.pods.values():
        if pod.node in room:
            room[pod.node] -= pod.memory_gib
    return room


def _fits(world: World, pod: PodView, node: str, free_gib: int) -> bool:
    return 0 < pod.memory_gib <= free_gib and selects(pod.node_selector, world.nodes[node].labels)


def _stays(found: Moves, policy: str, pod: PodView, why: str) -> None:
    found.staying.setdefault(policy, []).append(f"{pod.key} {why}")
