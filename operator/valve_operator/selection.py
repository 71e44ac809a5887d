# SPDX-License-Identifier: Apache-2.0
"""Which policy holds on which node. Pure; called by reconcile.

Where several policies select a node, the one with the highest `priority` holds on it; among equals the
oldest, then the first by name. So a new policy with the default priority takes nothing away, and whoever
wants a canary gives it a higher priority.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from valve_operator.world import NodeView, PolicyView


@dataclass(slots=True)
class Selection:
    """held: node → policy. lost: policy → {policy that holds instead: number of nodes}."""

    held: dict[str, str] = field(default_factory=dict)
    lost: dict[str, dict[str, int]] = field(default_factory=dict)


def rank(policy: PolicyView) -> tuple[int, str, str]:
    """Sorts the policy that wins to the front."""
    return (-policy.priority, policy.created, policy.name)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """All of the selector's labels are there; an empty selector selects every node."""
    return all(labels.get(key) == value for key, value in selector.items())


def select(nodes: Iterable[NodeView], policies: Iterable[PolicyView]) -> Selection:
    """Who holds where. A refused policy keeps its place, so that a typo in it hands no node to another."""
    ranked = sorted(policies, key=rank)
    selection = Selection()
    for node in nodes:
        winner = ""
        for policy in ranked:
            if not selects(policy.selector, node.labels):
                continue
            if not winner:
                winner = policy.name
                selection.held[node.name] = winner
            else:
                losses = selection.lost.setdefault(policy.name, {})
                losses[winner] = losses.get(winner, 0) + 1
    return selection
