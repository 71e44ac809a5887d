# SPDX-License-Identifier: Apache-2.0
"""Which offline slabs to take: those whose loss harms the fewest requests.

Why it exists: a request that loses one KV block is recomputed whole, so the cost of a
reclaim is the *union* of the owners of the slabs taken, not their number.  Finding the
minimum union is NP-hard.  Several greedies are run and the best result is taken, for
none of them is always good:

* forward: harm the owners of the slab that adds the fewest.  Good when few slabs are needed;
  alone it harms many short requests where one long one would do.
* forward per slab: the same per slab won, as many slabs have the same owners (one request's
  neighbouring slabs; every layer's slab of the same blocks).
* backward: harm everyone, then spare whom the fewest slabs depend on.  Good when many are needed; not
  tried below a 64th of the slabs, where it never won (120 random pools) and is half of the time.
* whole tenants: harm everyone in as few tenants as possible.

Each is followed by the backward greedy, so no single harmed request could have been spared.
``valve bench victims`` compares with FIFO, LRU and random, and shows the time per choice.
Pure: no I/O, no clock, no threads; the pool calls it on the reclaim path with what it read
from the tenants' ledgers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import compress
from typing import NamedTuple

Request = tuple[int, int]
"""(tenant, slot): slots are the request numbers in that tenant's ledger."""


_BIT_OF_DIGIT = bytes.maketrans(b"01", b"\0\1")
_FEW = 16
"""Owners of one slab up to which looking them up one by one is quicker than going through all slots. Pools of
`valve bench victims` are too small to show it; with 3 owners a slab in 1,024 slots a choice takes 5.6 ms, and
9.5 ms without (768 slabs, device: cpu)."""
_MANY = 64
"""A need of at least one slab in so many is large enough for the backward greedy."""


class SlabView(NamedTuple):
    """One slab that a tenant holds.  (tenant, slab) names it; no two views share a name."""

    tenant: int
    slab: int
    owners: int  # bit r set: the tenant's request r owns part of it
    pinned: bool = False  # never chosen
    last_use: int = 0  # any increasing number; only the baselines look at it


@dataclass(frozen=True, slots=True)
class Choice:
    """Slabs to reclaim, in the order chosen, and what their loss costs."""

    slabs: tuple[SlabView, ...]
    harmed: frozenset[Request]
    tokens: int  # to recompute, summed over harmed
    slabs_in_use: int  # of slabs, how many have an owner

    def by_tenant(self) -> dict[int, list[int]]:
        """Slab numbers per tenant, ascending: one RECLAIM each."""
        sets: defaultdict[int, list[int]] = defaultdict(list)
        for view in self.slabs:
            sets[view.tenant].append(view.slab)
        return {tenant: sorted(slabs) for tenant, slabs in sets.items()}


def choose(slabs: Sequence[SlabView], need: int, tokens: Mapping[int, Sequence[int]]) -> Choice:
    """Choose ``need`` slabs, or all that are not pinned if there are fewer (the caller decides).

    tokens: tenant -> slot -> tokens to recompute if that request is lost; a tenant or slot
    that is missing counts 0 (a checkpointed request costs nothing, too).

    Slabs without an owner come first.  For the others the best of several greedies is taken, by
    requests harmed, then by tokens; the result depends on nothing but the set of views.
    """
    usable = sorted(view for view in slabs if not view.pinned)  # by name: names are unique
    free = [view for view in usable if not view.owners]
    if need <= len(free):
        return account(free[: max(need, 0)], tokens)
    if need >= len(usable):
        return account(usable, tokens)
    missing = need - len(free)
    pool = _Pool(usable, tokens)
    candidates = [pool.spare(pool.harm(missing, per_slab=False), missing)]
    if missing * _MANY >= len(usable) - len(free):
        candidates.append(pool.spare(range(len(pool.requests)), missing))
    if pool.has_twins:
        candidates.append(pool.spare(pool.harm(missing, per_slab=True), missing))
    if len(pool.tenants) > 1:
        candidates.append(pool.spare(pool.whole_tenants(missing), missing))
    harmed: defaultdict[int, int] = defaultdict(int)
    for number in min(candidates, key=lambda some: (len(some), pool.cost(some))):
        tenant, slot = pool.requests[number]
        harmed[tenant] |= 1 << slot
    lost = [view for view in usable if view.owners and not view.owners & ~harmed[view.tenant]]
    return account(free + lost[:missing], tokens)


class _Pool:
    """The owned slabs of one choice: requests numbered, slabs with the same owners in one group."""

    def __init__(self, views: Sequence[SlabView], tokens: Mapping[int, Sequence[int]]) -> None:
        sizes: defaultdict[tuple[int, int], int] = defaultdict(int)
        union: defaultdict[int, int] = defaultdict(int)
        for tenant, _, owners, _, _ in views:
            if owners:
                sizes[tenant, owners] += 1
                union[tenant] |= owners
        self.tenants = list(union)
        self.requests: list[Request] = []
        numbers: dict[int, list[int]] = {}  # tenant -> slot -> number; -1 where nobody owns anything
        for tenant, owners in union.items():
            numbers[tenant] = [-1] * owners.bit_length()
            for slot in bits(owners):
                numbers[tenant][slot] = len(self.requests)
                self.requests.append((tenant, slot))
        self._price = [_price(tokens, request) for request in self.requests]
        self._sizes = list(sizes.values())
        self._owners = [_pick(numbers[tenant], owners) for tenant, owners in sizes]
        self._groups_of: list[list[int]] = [[] for _ in self.requests]
        for group, members in enumerate(self._owners):
            for request in members:
                self._groups_of[request].append(group)

    @property
    def has_twins(self) -> bool:
        """Whether at least a tenth of the slabs have the same owners as another.

        Otherwise counting per slab is the same greedy again, and only costs time.
        """
        return 10 * len(self._sizes) <= 9 * sum(self._sizes)

    def cost(self, requests: Iterable[int]) -> int:
        """Tokens to recompute if these requests are lost."""
        price = self._price
        return sum([price[request] for request in requests])

    def harm(self, need: int, *, per_slab: bool) -> list[int]:
        """Forward greedy: harm more requests until ``need`` slabs have no unharmed owner.

        Each step harms the unharmed owners of one group: the fewest, or with per_slab the
        fewest per slab of the group; ties by tokens, then by the order of the groups.

        Marginals only shrink, and a group that shrank is pushed again at once.  (A heap whose
        entries are refreshed when they come up is right for a maximum, but misses a minimum.)
        """
        price, groups_of = self._price, self._groups_of
        count = [len(members) for members in self._owners]  # unharmed owners of each group
        cost = [self.cost(members) for members in self._owners]
        share = self._sizes if per_slab else [1] * len(count)
        heap = [
            (count[group] / share[group], cost[group] / share[group], group) for group in range(len(count))
        ]
        heapify(heap)
        harmed: set[int] = set()
        won = 0
        while won < need:
            marginal, _, group = heappop(heap)
            if not count[group] or marginal != count[group] / share[group]:
                continue  # won already, or a newer entry stands for it
            touched: set[int] = set()
            for request in self._owners[group]:
                if request in harmed:
                    continue
                harmed.add(request)
                touched.update(groups_of[request])
                for other in groups_of[request]:
                    count[other] -= 1
                    cost[other] -= price[request]
            for other in touched:
                if count[other]:
                    heappush(heap, (count[other] / share[other], cost[other] / share[other], other))
                else:
                    won += self._sizes[other]
        return list(harmed)

    def whole_tenants(self, need: int) -> list[int]:
        """Harm everyone in as few tenants as win ``need`` slabs, most slabs per request first."""
        won = dict.fromkeys(self.tenants, 0)
        for members, size in zip(self._owners, self._sizes, strict=True):
            won[self.requests[members[0]][0]] += size
        by_tenant: dict[int, list[int]] = {tenant: [] for tenant in self.tenants}
        for number, (tenant, _) in enumerate(self.requests):
            by_tenant[tenant].append(number)
        harmed: list[int] = []
        for tenant in sorted(won, key=lambda tenant: len(by_tenant[tenant]) / won[tenant]):
            harmed += by_tenant[tenant]
            need -= won[tenant]
            if need <= 0:
                break
        return harmed

    def spare(self, harmed: Sequence[int], need: int) -> list[int]:
        """Backward greedy: unharm requests while ``need`` slabs are still won without them.

        Each step spares the request that the fewest won slabs depend on; ties by the most
        tokens, then by number.  Afterwards no single request can be spared.
        """
        sizes, price = self._sizes, self._price
        unharmed = [len(members) for members in self._owners]
        for request in harmed:
            for group in self._groups_of[request]:
                unharmed[group] -= 1
        excess = -need
        depends = dict.fromkeys(harmed, 0)  # kept request -> won slabs that it owns part of
        for group, members in enumerate(self._owners):
            if not unharmed[group]:
                excess += sizes[group]
                for request in members:
                    depends[request] += sizes[group]
        heap = [(count, -price[request], request) for request, count in depends.items()]
        heapify(heap)
        while heap and heap[0][0] <= excess:
            count, _, request = heappop(heap)
            if depends.get(request) != count:
                continue  # spared already, or a newer entry stands for it
            del depends[request]
            excess -= count
            touched: set[int] = set()
            for group in self._groups_of[request]:
                if unharmed[group]:
                    continue
                unharmed[group] = 1
                members = self._owners[group]
                touched.update(members)
                for other in members:
                    if other in depends:
                        depends[other] -= sizes[group]
            for other in touched:
                if other in depends:
                    heappush(heap, (depends[other], -price[other], other))
        return list(depends)


def account(slabs: Sequence[SlabView], tokens: Mapping[int, Sequence[int]]) -> Choice:
    """The Choice that takes exactly these slabs."""
    union: defaultdict[int, int] = defaultdict(int)
    for view in slabs:
        union[view.tenant] |= view.owners
    harmed = frozenset((tenant, slot) for tenant, owners in union.items() for slot in bits(owners))
    return Choice(
        slabs=tuple(slabs),
        harmed=harmed,
        tokens=sum(_price(tokens, request) for request in harmed),
        slabs_in_use=sum(1 for view in slabs if view.owners),
    )


def bits(mask: int) -> Iterator[int]:
    """The set bits of a mask, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _pick(numbers: Sequence[int], mask: int) -> list[int]:
    """``numbers`` at the set bits of ``mask``."""
    if mask.bit_count() <= _FEW:
        return [numbers[slot] for slot in bits(mask)]
    return list(compress(numbers, bin(mask)[:1:-1].encode().translate(_BIT_OF_DIGIT)))


def _price(tokens: Mapping[int, Sequence[int]], request: Request) -> int:
    tenant, slot = request
    of_slot = tokens.get(tenant, ())
    return of_slot[slot] if slot < len(of_slot) else 0
