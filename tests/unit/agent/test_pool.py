# SPDX-License-Identifier: Apache-2.0
"""The pool: nobody ever holds what another holds, online first, and every reclaim ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from valve_agent.policy.reservation import Reservation
from valve_agent.pool import ANSWER_TIMEOUT_NS, HOLD_TIMEOUT_NS, RETRY_NS, Holder, Pool
from valve_agent.shared import LedgerCopy
from valve_agent.wire import REQUESTS_MAX, Role, bits

SLABS = 32


@dataclass
class World:
    """Effects that remember. `mapped` is what a process believes it may use."""

    now_ns: int = 1
    holds: int = 0
    releases: int = 0
    asked: list[tuple[Holder, int, int]] = field(default_factory=list)
    granted: list[tuple[str, int]] = field(default_factory=list)
    discarded: list[tuple[str, int]] = field(default_factory=list)
    killed: list[Holder] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    mapped: dict[int, int] = field(default_factory=dict)
    owners: dict[tuple[int, int], int] = field(default_factory=dict)
    pinned: dict[int, int] = field(default_factory=dict)
    unreadable: set[int] = field(default_factory=set)

    def hold(self) -> None:
        self.holds += 1

    def release(self) -> None:
        self.releases += 1
        assert self.releases <= self.holds

    def ledger(self, holder: Holder) -> LedgerCopy | None:
        if holder.id in self.unreadable:
            return None
        owners = tuple(self.owners.get((holder.id, slab), 0) for slab in range(holder.slabs))
        tokens = tuple(range(REQUESTS_MAX))
        return LedgerCopy(1, holder.slabs, tokens, self.pinned.get(holder.id, 0), owners)

    def reclaim(self, holder: Holder, operation: int, mask: int) -> None:
        self.asked.append((holder, operation, mask))

    def discard(self, holder: Holder, mask: int) -> None:
        self.discarded.append((holder.name, mask.bit_count()))

    def grant(self, holder: Holder, mask: int) -> None:
        assert not self.mapped.get(holder.id, 0) & mask, "a slab is granted once"
        self.mapped[holder.id] = self.mapped.get(holder.id, 0) | mask
        self.granted.append((holder.name, mask.bit_count()))

    def kill(self, holder: Holder, why: str) -> None:
        assert why
        self.killed.append(holder)

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [event for event, _ in self.events]


def make(
    world: World, *, slabs: int = SLABS, reserve: tuple[int, int] = (2, 8), rate: int = 1000, floor: int = 0,
    recover_ns: int = 0,
) -> Pool:  # fmt: skip
    reservation = Reservation(
        min_slabs=reserve[0], max_slabs=reserve[1], increase_factor=2.0, decrease_slabs=1,
        quiet_period_ns=10 * RETRY_NS, now_ns=0,
    )  # fmt: skip
    return Pool(
        slabs=slabs, slab_bytes=1 << 21, reservation=reservation, max_reclaims_per_minute=rate, effects=world,
        online_floor_slabs=floor, clock=lambda: world.now_ns, recover_until_ns=recover_ns,
    )  # fmt: skip


def holder(
    number: int, role: Role, *, slabs: int = SLABS, limit: int = SLABS, tenant: int | None = None
) -> Holder:
    name = f"{role.name.lower()}-{number}"
    return Holder(number, number if tenant is None else tenant, name, role, slabs, limit)


def answer(pool: Pool, world: World) -> None:
    """Every asked victim remaps."""
    for victim, operation, mask in world.asked:
        world.mapped[victim.id] &= ~mask
        pool.on_reclaimed(victim, operation, mask)
    world.asked.clear()


def loaded(world: World, **options: Any) -> tuple[Pool, Holder, Holder]:
    """Offline holds all but the reservation; online has an arena and nothing in it."""
    pool = make(world, **options)
    offline, online = holder(1, Role.OFFLINE), holder(2, Role.ONLINE)
    pool.attach(offline)
    pool.attach(online)
    pool.on_want(offline, SLABS)
    assert offline.count == SLABS - 2
    return pool, offline, online


def test_offline_leaves_the_reservation_free() -> None:
    pool, _, _ = loaded(World())
    assert pool.free == pool.reservation.slabs == 2


def test_online_takes_what_is_free_without_asking_anybody() -> None:
    world = World()
    pool, _, online = loaded(world)
    pool.on_want(online, 2)
    assert online.count == 2
    assert world.holds == 0


def test_a_shortfall_is_reclaimed_together_with_the_new_reservation() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pool.on_want(online, 6)
    assert world.granted[-1] == ("online-2", 2), "what is free comes at once"
    assert (world.holds, world.asked) == (1, [])
    pool.on_held(True, "")
    ((victim, _, mask),) = world.asked
    assert victim is offline
    assert mask.bit_count() == 4 + 6, "shortfall 4; the reservation of 2 rises by the shortfall to 6"
    answer(pool, world)
    assert online.count == 6
    assert pool.free == pool.reservation.slabs == 6
    assert (world.holds, world.releases) == (1, 1)
    ((_, fields),) = [entry for entry in world.events if entry[0] == "reclaim"]
    assert fields["slabs"] == 10
    assert fields["victims"] == {"offline-1": 10}
    assert fields["bytes_in_use"] == 0, "no request owned any of it"


def test_memory_is_discarded_before_it_is_granted_and_granted_before_offline_goes_on() -> None:
    world = World()
    pool, _, online = loaded(world)
    order: list[str] = []
    for name in ("discard", "grant", "release"):
        original = getattr(world, name)
        setattr(world, name, lambda *a, n=name, o=original: (order.append(n), o(*a))[1])
    pool.on_want(online, 10)
    order.clear()
    pool.on_held(True, "")
    answer(pool, world)
    assert order == ["discard", "grant", "release"]


def test_pinned_slabs_are_never_victims() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pinned = sum(1 << slab for slab in list(bits(offline.held))[:5])
    world.pinned[offline.id] = pinned
    pool.on_want(online, SLABS)
    pool.on_held(True, "")
    answer(pool, world)
    assert offline.held == pinned
    assert online.count == SLABS - 5


def test_only_pinned_memory_left_is_said_once_and_tried_again_later() -> None:
    world = World()
    pool, offline, online = loaded(world)
    world.pinned[offline.id] = offline.held
    pool.on_want(online, 4)
    pool.on_held(True, "")
    assert "reclaim-impossible" in world.names()
    assert (world.holds, world.releases) == (1, 1)
    pool.settle()
    assert world.holds == 1, "not at once again"
    world.now_ns += RETRY_NS
    pool.tick()
    assert world.holds == 2


def test_in_use_counts_slabs_with_an_owner_and_harm_counts_requests() -> None:
    world = World()
    pool, offline, online = loaded(world, reserve=(2, 2))
    for slab in bits(offline.held):
        world.owners[offline.id, slab] = 1 << (slab % 3)
    pool.on_want(online, 2 + 10)
    pool.on_held(True, "")
    answer(pool, world)
    ((_, fields),) = [entry for entry in world.events if entry[0] == "reclaim"]
    assert fields["slabs"] == 12
    assert fields["bytes_in_use"] == 12 << 21
    assert fields["requests_harmed"] == 2, "12 slabs of 3 requests with 10 each: two requests suffice"


def test_a_victim_that_does_not_answer_is_killed_and_its_end_serves_online() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pool.on_want(online, 10)
    pool.on_held(True, "")
    assert pool.deadline_ns() == world.now_ns + ANSWER_TIMEOUT_NS
    world.now_ns += ANSWER_TIMEOUT_NS
    pool.tick()
    assert world.killed == [offline]
    assert world.releases == 1
    assert online.count == 2
    pool.detach(offline)
    assert online.count == 10


def test_the_wrong_slabs_are_no_answer() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pool.on_want(online, 10)
    pool.on_held(True, "")
    _, operation, mask = world.asked[0]
    pool.on_reclaimed(offline, operation, mask >> 1)
    assert world.killed == [offline]


def test_a_victim_that_dies_has_answered() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pool.on_want(online, 10)
    pool.on_held(True, "")
    pool.detach(offline)
    assert online.count == 10
    assert (world.holds, world.releases) == (1, 1)


def test_the_end_of_the_wanting_engine_ends_the_operation_cleanly() -> None:
    world = World()
    pool, _, online = loaded(world)
    pool.on_want(online, 10)
    pool.detach(online)
    pool.on_held(True, "")
    assert world.asked == []
    assert (world.holds, world.releases) == (1, 1)


def test_a_gate_that_cannot_hold_is_asked_again_later() -> None:
    world = World()
    pool, _, online = loaded(world)
    pool.on_want(online, 10)
    pool.on_held(False, "process 7 does not stop")
    assert world.names().count("reclaim-failed") == 1
    assert world.releases == 0, "nothing is held"
    world.now_ns += RETRY_NS
    pool.tick()
    assert world.holds == 2


def test_nothing_is_waited_for_where_nobody_can_give() -> None:
    """A time in the past would keep the server thread from sleeping."""
    world = World()
    pool, offline, online = loaded(world)
    pool.on_want(online, SLABS)
    pool.on_held(False, "process 7 does not stop")
    assert pool.deadline_ns() == world.now_ns + RETRY_NS
    pool.disconnected(offline)
    world.now_ns += RETRY_NS
    pool.tick()
    deadline = pool.deadline_ns()
    assert deadline is None or deadline > world.now_ns
    assert world.holds == 1


def test_a_hold_that_comes_too_late_is_released() -> None:
    world = World()
    pool, _, online = loaded(world)
    pool.on_want(online, 10)
    world.now_ns += HOLD_TIMEOUT_NS
    pool.tick()
    assert not pool.reclaiming
    pool.on_want(online, 0)
    pool.on_held(True, "")
    assert (world.holds, world.releases) == (1, 1)


def test_an_unreadable_ledger_costs_its_process() -> None:
    world = World()
    pool, offline, online = loaded(world)
    world.unreadable.add(offline.id)
    pool.on_want(online, 10)
    pool.on_held(True, "")
    assert world.killed == [offline]


def test_a_disconnected_process_keeps_its_slabs_and_is_no_victim() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pool.disconnected(offline)
    pool.on_want(online, 10)
    assert world.holds == 0
    assert online.count == 2
    assert offline.count == SLABS - 2


def test_offline_grows_again_but_not_into_the_reservation() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pool.on_want(online, 10)
    pool.on_held(True, "")
    answer(pool, world)
    mask = online.held
    pool.on_want(online, 0)
    pool.on_return(online, mask)
    assert pool.free == pool.reservation.slabs == 8
    assert offline.count == SLABS - 8


def test_quiet_periods_give_the_reservation_to_offline() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pool.on_want(online, 10)
    pool.on_held(True, "")
    answer(pool, world)
    before = offline.count
    world.now_ns += 100 * RETRY_NS
    pool.tick()
    assert pool.reservation.slabs == 2
    assert offline.count == before + 6


def test_too_many_reclaims_stop_offline_growth_never_online() -> None:
    world = World()
    pool, offline, online = loaded(world, reserve=(2, 2), rate=2)
    for round_number in range(3):
        for slab in bits(offline.held):
            world.owners[offline.id, slab] = 1
        pool.on_want(online, online.count + 4)
        pool.on_held(True, "")
        answer(pool, world)
        assert online.count == 4 * (round_number + 1)
    mask = online.held
    held = offline.count
    pool.on_want(online, 0)
    pool.on_return(online, mask)
    assert offline.count == held
    assert ("offline-growth", {"stopped": True}) in world.events
    world.now_ns += 62_000_000_000
    pool.tick()
    assert offline.count == SLABS - 2


def test_nothing_for_offline_while_recovering() -> None:
    world = World()
    pool = make(world, recover_ns=RETRY_NS)
    offline = holder(1, Role.OFFLINE)
    pool.attach(offline)
    pool.on_want(offline, 4)
    assert offline.count == 0
    assert pool.deadline_ns() == RETRY_NS
    world.now_ns = RETRY_NS
    pool.tick()
    assert offline.count == 4


def test_more_restored_than_the_device_has_is_reclaimed() -> None:
    world = World()
    pool = make(world)
    online, offline = holder(1, Role.ONLINE), holder(2, Role.OFFLINE)
    online.held = (1 << 20) - 1
    offline.held = (1 << 16) - 1
    world.mapped = {1: online.held, 2: offline.held}
    pool.attach(online)
    pool.attach(offline)
    assert pool.free == -4
    assert world.holds == 1
    pool.on_held(True, "")
    answer(pool, world)
    assert pool.free >= 0
    assert online.count == 20


def test_the_online_floor_is_never_offlines() -> None:
    world = World()
    pool = make(world, floor=10)
    offline = holder(1, Role.OFFLINE)
    pool.attach(offline)
    pool.on_want(offline, SLABS)
    assert offline.count == SLABS - 10


@pytest.mark.parametrize(
    ("what", "wants", "expected"),
    [
        ("equal wants, equal shares", (40, 40), (15, 15)),
        ("a modest one leaves the rest", (4, 40), (4, 26)),
        ("nothing wanted, nothing given", (0, 3), (0, 3)),
    ],
)
def test_offline_shares(what: str, wants: tuple[int, int], expected: tuple[int, int]) -> None:
    world = World()
    pool = make(world, recover_ns=5)
    holders = [holder(1, Role.OFFLINE), holder(2, Role.OFFLINE)]
    for one, want in zip(holders, wants, strict=True):
        pool.attach(one)
        pool.on_want(one, want)
    world.now_ns = 5
    pool.tick()
    assert tuple(one.count for one in holders) == expected


def test_a_tenants_limit_spans_its_processes() -> None:
    world = World()
    pool = make(world)
    holders = [holder(number, Role.OFFLINE, limit=10, tenant=9) for number in (1, 2)]
    for one in holders:
        pool.attach(one)
        pool.on_want(one, 8)
    assert [one.count for one in holders] == [8, 2]


def test_a_tenants_limit_holds_when_its_processes_are_served_together() -> None:
    world = World()
    pool = make(world, recover_ns=5)
    holders = [holder(number, Role.OFFLINE, limit=10, tenant=9) for number in (1, 2)]
    for one in holders:
        pool.attach(one)
        pool.on_want(one, 8)
    world.now_ns = 5
    pool.tick()
    assert [one.count for one in holders] == [5, 5]


def test_a_return_lowers_the_want_with_it() -> None:
    """Else what comes back would be granted again before the lower WANT arrives."""
    world = World()
    pool = make(world)
    online = holder(1, Role.ONLINE)
    pool.attach(online)
    pool.on_want(online, 10)
    pool.on_return(online, 0b1111)
    assert online.count == 6
    assert online.want == 6


def test_a_return_may_cross_a_reclaim() -> None:
    world = World()
    pool, offline, online = loaded(world)
    pool.on_want(online, 10)
    pool.on_held(True, "")
    _, operation, mask = world.asked[0]
    low = mask & -mask
    pool.on_return(offline, low)
    pool.on_reclaimed(offline, operation, mask)
    assert world.killed == []
    assert pool.free + online.count + offline.count == SLABS


class PoolMachine(RuleBasedStateMachine):
    """Any order of wants, returns, deaths, lost connections, answers and time."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.pool = make(self.world)
        self.number = 0
        self.dead: list[Holder] = []
        self.holds_answered = 0

    def some(self, data: st.DataObject) -> Holder | None:
        holders = list(self.pool.holders.values())
        return data.draw(st.sampled_from(holders)) if holders else None

    @rule(online=st.booleans(), limit=st.integers(1, SLABS), slabs=st.integers(1, SLABS))
    @precondition(lambda self: len(self.pool.holders) < 5)
    def arrive(self, online: bool, limit: int, slabs: int) -> None:
        self.number += 1
        role = Role.ONLINE if online else Role.OFFLINE
        self.pool.attach(holder(self.number, role, slabs=slabs, limit=SLABS if online else limit))

    @rule(data=st.data(), total=st.integers(0, SLABS + 4))
    def want(self, data: st.DataObject, total: int) -> None:
        one = self.some(data)
        if one is not None and one.attached:
            self.pool.on_want(one, total)

    @rule(data=st.data(), mask=st.integers(0, (1 << SLABS) - 1))
    def give_back(self, data: st.DataObject, mask: int) -> None:
        one = self.some(data)
        if one is not None and one.attached:
            mask &= self.world.mapped.get(one.id, 0)
            self.world.mapped[one.id] = self.world.mapped.get(one.id, 0) & ~mask
            self.pool.on_return(one, mask)

    @rule(data=st.data(), slot=st.integers(0, 5), pin=st.booleans())
    def own(self, data: st.DataObject, slot: int, pin: bool) -> None:
        one = self.some(data)
        if one is not None and one.held:
            slab = data.draw(st.sampled_from(list(bits(one.held))))
            if pin:
                self.world.pinned[one.id] = self.world.pinned.get(one.id, 0) | 1 << slab
            else:
                self.world.owners[one.id, slab] = 1 << slot

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        one = self.some(data)
        if one is not None:
            self.world.mapped.pop(one.id, None)
            self.pool.detach(one)

    @rule(data=st.data())
    def lose_connection(self, data: st.DataObject) -> None:
        one = self.some(data)
        if one is not None:
            self.pool.disconnected(one)

    @rule(ok=st.booleans())
    @precondition(lambda self: self.holds_answered < self.world.holds)
    def gate_answers(self, ok: bool) -> None:
        self.holds_answered += 1
        if not ok:
            self.world.holds -= 1
            self.holds_answered -= 1
        self.pool.on_held(ok, "" if ok else "it does not stop")

    @rule()
    @precondition(lambda self: self.world.asked)
    def victims_answer(self) -> None:
        alive = [entry for entry in self.world.asked if entry[0].id in self.pool.holders]
        self.world.asked = alive
        for one, operation, mask in list(alive):
            self.world.mapped[one.id] &= ~mask
            self.world.asked.remove((one, operation, mask))
            self.pool.on_reclaimed(one, operation, mask)

    @rule(ns=st.sampled_from([1, ANSWER_TIMEOUT_NS, RETRY_NS, HOLD_TIMEOUT_NS, 20 * RETRY_NS]))
    def time_passes(self, ns: int) -> None:
        self.world.now_ns += ns
        self.pool.tick()
        for one in self.world.killed:
            self.world.mapped.pop(one.id, None)
            self.pool.detach(one)
        self.world.killed.clear()

    @invariant()
    def nothing_is_given_twice(self) -> None:
        assert 0 <= self.pool.free <= SLABS
        for one in self.pool.holders.values():
            mapped = self.world.mapped.get(one.id, 0)
            asked = sum(mask for victim, _, mask in self.world.asked if victim is one)
            assert mapped & ~one.held & ~asked == 0, "a process uses only what it holds"
            assert one.held >> one.slabs == 0
            assert one.count <= one.limit

    @invariant()
    def offline_never_holds_the_reservation_by_growth(self) -> None:
        for event, fields in self.world.events[-1:]:
            if event == "grant" and str(fields["tenant"]).startswith("offline"):
                assert self.pool.free >= self.pool.reservation.slabs

    @invariant()
    def holds_and_releases_match(self) -> None:
        standing = self.holds_answered - self.world.releases
        assert standing == (1 if self.pool.reclaiming and self.pool._operation.held_ns else 0)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
