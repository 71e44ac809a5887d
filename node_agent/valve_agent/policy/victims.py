# SPDX-License-Identifier: Apache-2.0
"""Which offline slabs to take: those whose loss harms the fewest requests.

Why it exists: a request that loses one KV block is recomputed whole, so the cost of a
reclaim is the *union* of the owners of the slabs taken, not their number.  Finding the
minimum union is NP-hard; this is a greedy.  Pure: no I/O, no clock, no threads; the pool
calls it on the reclaim path with what it read from the tenants' ledgers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

Request = tuple[int, int]
"""(tenant, slot): slots are the request numbers in that tenant's ledger."""


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

    Order: slabs without an owner, then again and again the slab that newly harms the fewest
    requests, ties by the tokens of those, then by (tenant, slab).
    """
    if need <= 0:
        return account((), tokens)
    groups: defaultdict[tuple[int, int], list[SlabView]] = defaultdict(list)
    for view in slabs:
        if not view.pinned:
            groups[view.tenant, view.owners].append(view)
    taken: list[SlabView] = []
    live: list[tuple[int, int, list[SlabView]] | None] = []  # tenant, owners not yet harmed, slabs
    for (tenant, owners), members in groups.items():
        members.sort(key=_name)
        if owners:
            live.append((tenant, owners, members))
        else:
            taken += members
    taken.sort(key=_name)
    of_request: defaultdict[Request, list[int]] = defaultdict(list)
    heap: list[tuple[int, int, int, int, int]] = []
    for index, group in enumerate(live):
        assert group is not None
        tenant, owners, members = group
        for slot in bits(owners):
            of_request[tenant, slot].append(index)
        heap.append((owners.bit_count(), _cost(tokens, tenant, owners), tenant, members[0].slab, index))
    heapify(heap)
    while len(taken) < need and heap:
        marginal, _, tenant, _, index = heappop(heap)
        group = live[index]
        if group is None or group[1].bit_count() != marginal:
            continue  # taken already, or a newer entry stands for it
        live[index] = None
        taken += group[2]
        touched: set[int] = set()
        for slot in bits(group[1]):
            touched.update(of_request.pop((tenant, slot), ()))
        for other in touched:
            entry = live[other]
            if entry is None:
                continue
            left = entry[1] & ~group[1]
            live[other] = (tenant, left, entry[2])
            heappush(heap, (left.bit_count(), _cost(tokens, tenant, left), tenant, entry[2][0].slab, other))
    return account(taken[:need], tokens)


def account(slabs: Sequence[SlabView], tokens: Mapping[int, Sequence[int]]) -> Choice:
    """The Choice that takes exactly these slabs."""
    harmed: defaultdict[int, int] = defaultdict(int)
    for view in slabs:
        harmed[view.tenant] |= view.owners
    return Choice(
        slabs=tuple(slabs),
        harmed=frozenset((tenant, slot) for tenant, owners in harmed.items() for slot in bits(owners)),
        tokens=sum(_cost(tokens, tenant, owners) for tenant, owners in harmed.items()),
        slabs_in_use=sum(1 for view in slabs if view.owners),
    )


def bits(mask: int) -> Iterator[int]:
    """The set bits of a mask, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _name(view: SlabView) -> tuple[int, int]:
    return view.tenant, view.slab


def _cost(tokens: Mapping[int, Sequence[int]], tenant: int, owners: int) -> int:
    of_slot = tokens.get(tenant, ())
    return sum(of_slot[slot] for slot in bits(owners) if slot < len(of_slot))
