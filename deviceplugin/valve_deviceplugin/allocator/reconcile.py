# SPDX-License-Identifier: Apache-2.0
"""The book against what the kubelet says that containers have.

Why it exists: Allocate names no pod and nobody tells a plugin that a pod is gone; both are in the kubelet's
pod-resources list. The list decides who owns an entry. It ends one when it has shown none of its ids for a
while: a short one if it has shown them before, for then the pod is gone; a long one if it never has, for a
container that is being admitted is not listed yet and a non-restartable init container never is. While a
kubelet has just started, its list is incomplete and ends nothing.

Threading model: pure; time is an argument. `Absences` belongs to its caller. Caller: state.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from valve_api.container import ContainerName, Listing
from valve_deviceplugin.allocator.ledger import Entry, Ledger
from valve_deviceplugin.allocator.placement import Gpu
from valve_deviceplugin.allocator.units import named_gpus


@dataclass
class Absences:
    """Since when which entry has not been listed, and how long that may last (seconds)."""

    gone_after_s: float
    """for an entry whose owner is known"""
    release_after_s: float
    """for one that was never listed"""
    since_s: dict[int, float] = field(default_factory=dict)

    def allocated(self, entry_id: int) -> None:
        """An old entry is a new container's: it has not been absent yet."""
        self.since_s.pop(entry_id, None)


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
    at_s: float,
    may_release: bool,
    library: str,
) -> Changes:
    """Bring the ledger up to the listing. seats: the resource whose ids are GPUs and count no memory.
    may_release: False while the listing may be incomplete (the kubelet has just started); then nothing counts
    as absent. now_s: monotonic; at_s: Unix time, for entries that are made. library: what those are taken to
    mount."""
    changes = Changes()
    for (resource, owner), tokens in listing.items():
        holders = ledger.holders(resource, tokens)
        if len(holders) == 1 and holders[0].tokens == tokens:
            if holders[0].owner != owner:
                entry = replace(holders[0], owner=owner)
                ledger.put(entry)
                changes.owned.append(entry)
            continue
        adopted = _adopt(ledger, resource, owner, tokens, holders, gpus, seats, at_s, library)
        if adopted is not None:
            ledger.put(adopted)
            changes.adopted.append(adopted)
    present = {(resource, token) for (resource, _), tokens in listing.items() for token in tokens}
    for entry in list(ledger):
        if not may_release or any((entry.resource, token) in present for token in entry.tokens):
            absences.since_s.pop(entry.id, None)
            continue
        since = absences.since_s.setdefault(entry.id, now_s)
        patience_s = absences.release_after_s if entry.owner is None else absences.gone_after_s
        if now_s - since >= patience_s:
            ledger.drop(entry.id)
            changes.released.append(entry)
    living = {entry.id for entry in ledger}
    for gone in absences.since_s.keys() - living:
        del absences.since_s[gone]
    return changes


def _adopt(
    ledger: Ledger, resource: str, owner: ContainerName, tokens: frozenset[str], holders: Sequence[Entry],
    gpus: Sequence[Gpu], seats: str, at_s: float, library: str,
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
    return Entry(ledger.new_id(), resource, places, units, tokens, owner, 0, mounted, at_s)
