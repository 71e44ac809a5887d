# SPDX-License-Identifier: Apache-2.0
"""The parts of a plugin that know no engine: usable blocks, what to ask for, gaps, the ledger."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_runtime.elastic import (
    GRANTED,
    LOST,
    DecodeGap,
    Demand,
    DemandSettings,
    ElasticPool,
    Ledger,
    await_pinned,
)
from valve_runtime.geometry import Region, build

TWO_THIRDS = build([Region(0, 1, 0, 6, 6)], 6, 9, 4)  # blocks 0..5 of 6 bytes on slabs of 9: 3 on 2
SCATTERED = build([Region(0, 2, 40, 10, 10)], 4, 10, 8)


class Link:
    """Records what a plugin says; plays back events."""

    def __init__(self, events: list[tuple[int, int]] | None = None) -> None:
        self.events = events or []
        self.wants: list[tuple[int, bool]] = []
        self.ledger: dict[str, Any] = {}
        self.commits = 0

    def want(self, total_slabs: int, urgent: bool) -> None:
        self.wants.append((total_slabs, urgent))

    def give_back(self, slab: int) -> bool:
        return True

    def poll(self) -> tuple[int, int] | None:
        return self.events.pop(0) if self.events else None

    def busy(self) -> None: ...
    def idle(self, decode_gap_ns: int) -> None: ...
    def count(self, counter: int, n: int) -> None: ...

    def ledger_begin(self) -> bool:
        self.ledger = {"tokens": {}, "own": set(), "pins": set()}
        return True

    def ledger_request(self, slot: int, tokens: int) -> None:
        self.ledger["tokens"][slot] = tokens

    def ledger_own(self, slab: int, slot: int) -> None:
        self.ledger["own"].add((slab, slot))

    def ledger_pin(self, slab: int) -> None:
        self.ledger["pins"].add(slab)

    def ledger_commit(self) -> None:
        self.commits += 1


def granted(*slabs: int) -> list[tuple[int, int]]:
    return [(GRANTED, slab) for slab in slabs]


def lost(*slabs: int) -> list[tuple[int, int]]:
    return [(LOST, slab) for slab in slabs]


POOL_CASES = [
    # description, before, events, lost blocks, gained blocks, usable after
    ("a block needs all its slabs", [], granted(0), set(), {0}, {0}),
    ("the second slab completes the block between", granted(0), granted(1), set(), {1, 2}, {0, 1, 2}),
    ("a lost slab takes every block on it", granted(0, 1), lost(1), {1, 2}, set(), {0}),
    ("lost and granted again: both", granted(0, 1), lost(1) + granted(1), {1, 2}, {1, 2}, {0, 1, 2}),
    ("granted and lost unseen: neither", [], granted(0) + lost(0), set(), set(), set()),
    ("granted twice counts once", granted(0), granted(0), set(), set(), {0}),
    ("a loss of what is not held changes nothing", granted(0), lost(3), set(), set(), {0}),
]


@pytest.mark.parametrize(
    ("before", "events", "gone", "gained", "usable"),
    [case[1:] for case in POOL_CASES],
    ids=[case[0] for case in POOL_CASES],
)
def test_blocks_follow_slabs(
    before: list[tuple[int, int]],
    events: list[tuple[int, int]],
    gone: set[int],
    gained: set[int],
    usable: set[int],
) -> None:
    pool = ElasticPool(TWO_THIRDS)
    pool.apply(before)
    change = pool.apply(events)
    assert (change.lost, change.gained) == (gone, gained)
    assert {b for b in range(6) if pool.is_usable(b)} == usable
    assert pool.usable == len(usable)


@given(st.lists(st.tuples(st.sampled_from([GRANTED, LOST]), st.integers(0, 3)), max_size=40), st.data())
def test_no_block_is_trusted_that_was_lost_since_the_engine_looked(
    events: list[tuple[int, int]], data: st.DataObject
) -> None:
    """The engine's view, kept only from what `apply` tells it, equals the truth; a block that lost a slab at
    any time between two looks is in `lost` if the engine had it."""
    pool = ElasticPool(TWO_THIRDS, pinned=(0,))
    held: set[int] = set()
    engine: set[int] = set()
    while events:
        cut = data.draw(st.integers(1, len(events)))
        part, events = events[:cut], events[cut:]
        harmed: set[int] = set()
        for kind, slab in part:
            if kind == LOST and slab in held:
                harmed |= set(TWO_THIRDS.blocks_of[slab])
            (held.add if kind == GRANTED else held.discard)(slab)
        change = pool.apply(part)
        assert engine & harmed <= change.lost
        assert change.lost <= engine
        engine = (engine - change.lost) | change.gained
        assert engine == {b for b in range(1, 6) if set(TWO_THIRDS.slabs_of[b]) <= held}


def test_returnable_prefers_useless_slabs_then_the_highest() -> None:
    pool = ElasticPool(TWO_THIRDS, pinned=(0,))
    pool.apply(granted(0, 1, 3))  # slab 3 alone carries no whole block but 5
    assert pool.returnable({1, 2, 5}, 9) == [3, 1]  # 0 carries the pinned block
    assert pool.returnable({1, 2}, 9) == [1]  # block 5 on slab 3 is in use
    assert pool.returnable({2, 5}, 9) == [3]  # block 1 on slab 1 is in use
    assert pool.returnable({1, 2, 5}, 1) == [3]


def test_rising_demand_is_said_once_and_at_once() -> None:
    link, pool = Link(), ElasticPool(TWO_THIRDS)
    demand = Demand(link, pool, DemandSettings(repeat_s=5))
    demand.raise_to(3, 0.0, urgent=True)
    demand.raise_to(2, 0.1, urgent=True)
    assert link.wants == [(3, True)]  # 3 blocks on 2 slabs, and one for the pieces
    demand.raise_to(6, 0.2, urgent=True)
    assert link.wants[-1] == (4, True)
    demand.raise_to(6, 5.3, urgent=False)
    assert link.wants[-1] == (4, False), "an unfulfilled want is repeated"


def test_more_is_asked_when_what_is_held_is_in_pieces() -> None:
    link, pool = Link(), ElasticPool(TWO_THIRDS)
    pool.apply(granted(1, 3))  # blocks 2 and 5 only
    demand = Demand(link, pool, DemandSettings())
    assert demand.slabs_for(2) == 2
    assert demand.slabs_for(3) == 4


def test_a_scattered_layout_is_all_or_nothing() -> None:
    assert Demand(Link(), ElasticPool(SCATTERED), DemandSettings()).slabs_for(1) == 8


def test_surplus_goes_back_late_and_in_steps() -> None:
    settings = DemandSettings(floor_blocks=1, idle_return_s=1.0, return_slabs=1, return_every_s=0.1)
    link, pool = Link(), ElasticPool(TWO_THIRDS)
    demand = Demand(link, pool, settings)
    demand.raise_to(6, 0.0, urgent=False)
    pool.apply(granted(0, 1, 2, 3))
    assert demand.surplus(6, 1.0) == 0
    assert demand.surplus(1, 2.0) == 0, "too early"
    assert demand.surplus(6, 2.5) == 0, "demand is back: the clock starts again"
    assert demand.surplus(1, 3.0) == 0
    assert demand.surplus(1, 3.9) == 0
    assert demand.surplus(1, 4.0) == 1
    assert link.wants[-1] == (2, False)  # one for the block, one slack
    assert demand.surplus(1, 4.05) == 0, "one step at a time"
    pool.give_up(3)
    assert demand.surplus(1, 4.2) == 1


def test_await_pinned_takes_the_grants_into_account() -> None:
    link, pool = Link(granted(0, 1)), ElasticPool(TWO_THIRDS, pinned=(1,))
    await_pinned(link, pool, DemandSettings())
    assert pool.pinned_slabs <= pool.held
    assert link.wants


def test_longest_gap_of_the_window() -> None:
    gap = DecodeGap(window_s=10)
    assert gap.longest_ns(0.0) == 0
    for at in (0.0, 0.05, 0.25, 0.30):
        gap.iteration(at)
    assert gap.longest_ns(0.3) == pytest.approx(0.2e9)
    gap.rest()
    gap.iteration(9.0)  # the idle time before it is no gap
    gap.iteration(9.1)
    assert gap.longest_ns(9.1) == pytest.approx(0.2e9)
    assert gap.longest_ns(11.0) == pytest.approx(0.1e9), "the long one has left the window"


def test_the_ledger_says_who_owns_what() -> None:
    link, pool = Link(), ElasticPool(TWO_THIRDS, pinned=(0,))
    ledger = Ledger(link, pool)
    ledger.publish([("a", 7, [1]), ("b", 9, [2, 3])])
    assert link.ledger == {"tokens": {0: 7, 1: 9}, "own": {(0, 0), (1, 0), (1, 1), (2, 1)}, "pins": {0}}
    ledger.publish([("a", 8, [1, 5])])
    assert link.ledger["own"] == {(0, 0), (1, 0), (3, 0)}
    ledger.forget("a")
    ledger.publish([("a", 3, [4, 5])])
    assert link.ledger["own"] == {(2, 0), (3, 0)}
    assert link.commits == 3
