# SPDX-License-Identifier: Apache-2.0
"""What ``victims.choose`` is measured against: FIFO, LRU and random.

Why it exists: a claim that a choice is good needs something it is better than.  Called by
``valve bench victims`` and the tests, never by the agent.  Pure.  Like ``choose`` they never
take a pinned slab and return what there is if that is less than needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from valve_agent.policy.victims import Choice, SlabView, account


def fifo(slabs: Sequence[SlabView], need: int, tokens: Mapping[int, Sequence[int]]) -> Choice:
    """The first granted: ``slabs`` comes in the order of the grants."""
    return account(_usable(slabs)[: max(need, 0)], tokens)


def lru(slabs: Sequence[SlabView], need: int, tokens: Mapping[int, Sequence[int]]) -> Choice:
    """The longest unused."""
    by_use = sorted(_usable(slabs), key=lambda view: (view.last_use, view.tenant, view.slab))
    return account(by_use[: max(need, 0)], tokens)


def shuffled(slabs: Sequence[SlabView], need: int, tokens: Mapping[int, Sequence[int]], seed: int) -> Choice:
    """Any: the same ones for the same seed."""
    usable = _usable(slabs)
    return account(Random(seed).sample(usable, max(0, min(need, len(usable)))), tokens)


def _usable(slabs: Sequence[SlabView]) -> list[SlabView]:
    return [view for view in slabs if not view.pinned]
