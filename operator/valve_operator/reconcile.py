# SPDX-License-Identifier: Apache-2.0
"""The one decision of the operator: what differs from what should be, as actions.

`reconcile` is pure and total: it reads a World and two clocks and returns every action that is missing, in
the order in which they are best done. It does not know what was done before; a world in which nothing is
missing gives no actions, and doing any subset of the actions, in any order, never adds one that was not there
before for the same reason. Called by loop.py, in the event loop's thread.

    policy, labels of nodes  →  ColocationNode.spec, labels valve.io/managed and valve.io/starved
    templates                →  DaemonSets, while any policy is accepted
    ColocationNode.status    →  ColocationPolicy.status, evictions
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from valve_api.names import LABEL_MANAGED, LABEL_STARVED
from valve_operator.actions import (
    Action,
    DeleteDaemonSet,
    DeleteNode,
    LabelNode,
    WriteDaemonSet,
    WriteNode,
)
from valve_operator.eviction import Moves, moves
from valve_operator.selection import Selection, select
from valve_operator.status import status_of
from valve_operator.views import ANNOTATION_DIGEST
from valve_operator.world import Json, PolicyView, World

OUR_LABELS = (LABEL_MANAGED, LABEL_STARVED)


def reconcile(world: World, now: datetime, now_s: float) -> list[Action]:
    """Every missing action. now: wall clock, for conditions; now_s: monotonic seconds, for delays."""
    selection = select(world.nodes.values(), world.policies.values())
    moving = moves(world, selection.held, now_s)
    actions: list[Action] = list(_daemonsets(world))
    actions += _settings(world, selection)
    actions += _labels(world, selection, moving)
    actions += moving.evictions
    for name in sorted(world.policies):
        policy = world.policies[name]
        held = sorted(node for node, holder in selection.held.items() if holder == name)
        lost, staying = selection.lost.get(name, {}), moving.staying.get(name, [])
        written = status_of(world, policy, held, lost, staying, now)
        if written:
            actions.append(written)
    return actions


def node_spec(policy: PolicyView) -> Json:
    """ColocationNode.spec of the nodes that an accepted policy holds on."""
    assert policy.settings is not None
    return {**policy.settings, "policy": {"name": policy.name, "generation": policy.generation}}


def _daemonsets(world: World) -> Iterator[Action]:
    wanted = {}
    if any(policy.settings is not None for policy in world.policies.values()):
        wanted = {template["metadata"]["name"]: template for template in world.templates}
    elif world.policies:  # all refused: keep what runs
        return
    for name, manifest in sorted(wanted.items()):
        there = world.daemonsets.get(name)
        if there is None or there.digest != manifest["metadata"]["annotations"][ANNOTATION_DIGEST]:
            yield WriteDaemonSet(name, manifest)
    for name, there in sorted(world.daemonsets.items()):
        if name not in wanted:
            yield DeleteDaemonSet(name, there.uid)


def _settings(world: World, selection: Selection) -> Iterator[Action]:
    for name, holder in selection.held.items():
        policy, node = world.policies[holder], world.nodes[name]
        if policy.settings is None:
            continue
        spec, there = node_spec(policy), world.colonodes.get(name)
        if there is None or there.spec != spec or there.owner_uid != node.uid:
            yield WriteNode(name, spec, node.uid)
    for name, there in world.colonodes.items():
        if name not in selection.held:
            yield DeleteNode(name, there.uid)


def _labels(world: World, selection: Selection, moving: Moves) -> Iterator[Action]:
    for name, node in world.nodes.items():
        wanted = {}
        if name in selection.held:
            # A policy that never was accepted has given the node no settings: no agent there.
            if name in world.colonodes or world.policies[selection.held[name]].settings is not None:
                wanted[LABEL_MANAGED] = "true"
            if name in moving.starved:
                wanted[LABEL_STARVED] = "true"
        there = {label: node.labels[label] for label in OUR_LABELS if label in node.labels}
        if there != wanted:
            yield LabelNode(name, node.uid, wanted)
