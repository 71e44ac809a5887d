# SPDX-License-Identifier: Apache-2.0
"""Device ids: how the device plugin API's tokens meet GPUs.

Why it exists: the kubelet picks ids, in random order and for a container it does not name. An id says which
GPU it was made for; on which GPU it *counts* is the ledger's word, so that ids that lie on several GPUs are
no reason to fail a pod. One id is one GiB that somebody holds somewhere, so the free ids are always as many
as the free GiB, and nothing is promised twice.

An id can be in two requests of one pod: the kubelet lets containers reuse what an init container had. Then
the new container gets the ids (and goes to the same GPU if it fits there). Or the pod that had it is gone and
we have not heard: an entry whose owner is known is then known to be over, for owners are app containers,
whose ids nobody reuses.

Threading model: pure functions on a Ledger; state.py holds the lock. Callers: state.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from valve_deviceplugin.allocator.ledger import Entry, Ledger
from valve_deviceplugin.allocator.placement import Choice, Gpu, choose, room

ID_CHARACTERS_MAX = 63
"""The kubelet's limit on one id."""
_UUID = re.compile(r"(?:GPU|MIG)-([0-9a-fA-F-]{8,})")
_SHORT_MIN, _SHORT_MAX = 8, 48


@dataclass(frozen=True, slots=True)
class Allocated:
    """An entry that was made or found, and how."""

    entry: Entry
    repeated: bool
    """the same ids were asked for before"""
    remapped: bool
    """it lies on another GPU than its ids were made for"""


def short_names(gpus: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """A short name for each GPU id, none twice; names in `known` never change."""
    names = dict(known)
    for gpu in sorted(gpus):
        if gpu in names:
            continue
        match = _UUID.fullmatch(gpu)
        whole = match[1] if match else re.sub(r"[^A-Za-z0-9.-]", "-", gpu)
        taken = set(names.values())
        lengths = range(_SHORT_MIN if match else len(whole), _SHORT_MAX + 1)
        free = (whole[:length] for length in lengths if whole[:length] not in taken)
        names[gpu] = next(
            (short for short in free if not short.endswith("-")), f"{whole[:_SHORT_MIN]}.{len(taken)}"
        )
    return names


def unit_id(short: str, index: int) -> str:
    return f"{short}-{index:04d}"


def seat_id(short: str) -> str:
    return f"{short}-seat"


def named_gpus(tokens: Iterable[str], gpus: Sequence[Gpu]) -> Counter[str]:
    """How many of these ids were made for which GPU; ids of GPUs that are not there are left out."""
    by_short = {gpu.short: gpu.id for gpu in gpus}
    shorts = (token.rpartition("-")[0] for token in tokens)
    return Counter(by_short[short] for short in shorts if short in by_short)


def healthy_units(ledger: Ledger, resource: str, gpus: Sequence[Gpu]) -> dict[str, bool]:
    """Every id of the memory resource -> Healthy or not. Ids that somebody holds are, always; of the others
    as many as there is room on all GPUs, taken from a GPU's own ids while it has any."""
    taken = ledger.tokens(resource)
    used = ledger.used(resource)
    health: dict[str, bool] = {}
    spare: list[str] = []
    owed = 0
    for gpu in gpus:
        left = max(0, room(gpu, used))
        for index in range(gpu.units):
            token = unit_id(gpu.short, index)
            health[token] = token in taken or left > 0
            if token not in taken:
                if left > 0:
                    left -= 1
                else:
                    spare.append(token)
        owed += left
    for token in spare[:owed]:
        health[token] = True
    return health


def prefer_units(
    ledger: Ledger, resource: str, available: Collection[str], must: Collection[str], size: int,
    gpus: Sequence[Gpu],
) -> list[str]:  # fmt: skip
    """`size` of the available ids, those in `must` among them, of the GPU where the request should go."""
    picked = sorted(set(must))[:size]
    if not gpus:
        return picked
    target = _target(ledger, resource, picked, size, gpus, wished=Counter()).gpu
    own = {gpu.id: gpu.short for gpu in gpus}[target]
    free = sorted(set(available) - set(picked))
    names = named_gpus(free, gpus)
    used = ledger.used(resource)
    surplus = {gpu.short: names[gpu.id] - room(gpu, used) for gpu in gpus}

    def order(token: str) -> tuple[bool, int, str]:
        short = token.rpartition("-")[0]
        return (short != own, -surplus.get(short, 0), token)

    return picked + sorted(free, key=order)[: size - len(picked)]


def prefer_seats(
    used: Mapping[str, int], available: Collection[str], must: Collection[str], size: int, gpus: Sequence[Gpu]
) -> list[str]:
    """Seats on the GPUs with the least offline memory: the fewest reclaims."""
    picked = sorted(set(must))[:size]
    load = {seat_id(gpu.short): used.get(gpu.id, 0) for gpu in gpus}
    free = sorted(set(available) - set(picked), key=lambda token: (load.get(token, 0), token))
    return picked + free[: size - len(picked)]


def allocate_units(
    ledger: Ledger, resource: str, tokens: frozenset[str], gpus: Sequence[Gpu], *, now_s: float, library: str
) -> Allocated:
    """Write down that these ids are a container's. gpus: at least one. Never refuses: where no GPU has room,
    the entry says how much it is short."""
    wished = named_gpus(tokens, gpus)
    old = _same(ledger, resource, tokens)
    if old is not None and old.gpus[0] in {gpu.id for gpu in gpus}:
        entry = replace(old, owner=None, at_s=now_s, library=library)
        ledger.put(entry)
        return Allocated(entry, repeated=True, remapped=_remapped(entry, wished))
    for holder in ledger.holders(resource, tokens):
        if holder.owner is not None:  # its pod is gone: nobody reuses an app container's ids
            ledger.drop(holder.id)
    choice = _target(ledger, resource, tokens, len(tokens), gpus, wished)
    entry = Entry(
        ledger.new_id(), resource, (choice.gpu,), len(tokens), tokens, None, choice.shortage, library, now_s
    )
    ledger.put(entry)
    return Allocated(entry, repeated=False, remapped=_remapped(entry, wished))


def allocate_seats(
    ledger: Ledger, resource: str, tokens: frozenset[str], gpus: Sequence[Gpu], *, now_s: float, library: str
) -> Allocated:
    """A seat is its GPU; there is nothing to choose."""
    old = _same(ledger, resource, tokens)
    named = tuple(sorted(named_gpus(tokens, gpus)))
    number = ledger.new_id() if old is None else old.id
    entry = Entry(number, resource, named, 0, tokens, None, 0, library, now_s)
    for holder in ledger.holders(resource, tokens):
        if holder.owner is not None and holder.id != number:
            ledger.drop(holder.id)
    ledger.put(entry)
    return Allocated(entry, repeated=old is not None, remapped=False)


def _same(ledger: Ledger, resource: str, tokens: frozenset[str]) -> Entry | None:
    holders = ledger.holders(resource, tokens)
    return holders[0] if len(holders) == 1 and holders[0].tokens == tokens else None


def _target(
    ledger: Ledger, resource: str, tokens: Collection[str], size: int, gpus: Sequence[Gpu],
    wished: Counter[str],
) -> Choice:  # fmt: skip
    """Where a request goes. Ids that an unfinished entry of the same pod has count as free for it, on the GPU
    where they are, and draw it there."""
    used = Counter(ledger.used(resource))
    reused: Counter[str] = Counter()
    for token in tokens:
        holder = ledger.holder(resource, token)
        if holder is not None:
            reused[holder.gpus[0]] += 1
    used.subtract(reused)
    known = {gpu.id for gpu in gpus}
    reused = Counter({gpu: count for gpu, count in reused.items() if gpu in known})
    return choose(size, gpus, used, reused or wished)


def _remapped(entry: Entry, wished: Counter[str]) -> bool:
    return wished[entry.gpus[0]] < len(entry.tokens)
