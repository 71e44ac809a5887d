# SPDX-License-Identifier: Apache-2.0
"""The book against what the kubelet says that containers have.

Why it exists: Allocate names no pod and nobody tells a plugin that a pod is gone; both are in the kubelet's
pod-resources list. The list decides who owns an entry. It ends one only after it has not shown any of the
entry's ids for `release_after_s`: a container that is being admitted is not listed yet, a non-restartable
init container never is, and for a while after a kubelet restart nothing is.

Threading model: pure; time is an argument. `Absences` belongs to its caller. Caller: state.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from valve_deviceplugin.allocator.ledger import Entry, Ledger, Owner
from valve_deviceplugin.allocator.placement import Gpu
from valve_deviceplugin.allocator.units import named_gpus

Listing = Mapping[tuple[str, Owner], frozenset[str]]
"""(resource, container) -> its ids"""


@dataclass
class Absences:
    """Since when which entry has not been listed."""

    since_s: dict[int, float] = field(default_factory=dict)


@dataclass
class Changes:
    owned: list[Entry] = field(default_factory=list)
    adopted: list[Entry] = field(default_factory=list)
    """the kubelet knows them, we did not: their GPU is a guess from their ids"""
    released: list[Entry] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.owned or self.adopted or self.released)


def reconcile(
    ledger: Ledger,
    listing: Listing,
    absences: Absences,
    gpus: Sequence[Gpu],
    *,
    seats: str,
    now_s: float,
    release_after_s: float,
    may_release: bool,
    library: str,
) -> Changes:
    """Bring the ledger up to the listing. seats: the resource whose ids are GPUs and count no memory.
    may_release: False while the listing may be incomplete (the kubelet has just started); then nothing counts
    as absent. library: what adopted entries are taken to mount."""
    changes = Changes()
    for (resource, owner), tokens in listing.items():
        holders = ledger.holders(resource, tokens)
        if len(holders) == 1 and holders[0].tokens == tokens:
            if holders[0].owner != owner:
                entry = replace(holders[0], owner=owner)
                ledger.put(entry)
                changes.owned.append(entry)
            continue
        adopted = _adopt(ledger, resource, owner, tokens, holders, gpus, seats, now_s, library)
        if adopted is not None:
            ledger.put(adopted)
            changes.adopted.append(adopted)
    present = {(resource, token) for (resource, _), tokens in listing.items() for token in tokens}
    for entry in list(ledger):
        if not may_release or any((entry.resource, token) in present for token in entry.tokens):
            absences.since_s.pop(entry.id, None)
            continue
        since = absences.since_s.setdefault(entry.id, now_s)
        if min(now_s - since, now_s - entry.at_s) >= release_after_s:
            ledger.drop(entry.id)
            changes.released.append(entry)
    living = {entry.id for entry in ledger}
    for gone in absences.since_s.keys() - living:
        del absences.since_s[gone]
    return changes


def _adopt(
    ledger: Ledger, resource: str, owner: Owner, tokens: frozenset[str], holders: Sequence[Entry],
    gpus: Sequence[Gpu], seats: str, now_s: float, library: str,
) -> Entry | None:  # fmt: skip
    """An entry for what the kubelet says and the book does not, or not so. None: on no GPU that we know."""
    named = named_gpus(tokens, gpus)
    if resource == seats:
        places = tuple(sorted(named))
        units = 0
    else:
        known = {gpu.id for gpu in gpus}
        booked: Counter[str] = Counter()
        for entry in holders:
            if entry.gpus[0] in known:
                booked[entry.gpus[0]] += len(entry.tokens & tokens)
        likely = (booked or named).most_common(1)
        places = (likely[0][0],) if likely else ()
        units = len(tokens)
    if not places:
        return None
    mounted = next((entry.library for entry in holders if entry.library), library)
    return Entry(ledger.new_id(), resource, places, units, tokens, owner, 0, mounted, now_s)
