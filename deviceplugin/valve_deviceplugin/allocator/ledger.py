# SPDX-License-Identifier: Apache-2.0
"""The book: which tokens are taken, on which GPU they count, and whose they are.

Why it exists: the kubelet hands out tokens (device ids, or the claims of a DRA driver) and forgets nothing,
but it does not know GPUs and does not say for which pod it asks. The book says on which GPU a token counts,
whatever the token is called, and learns the owner later.

Invariants (property-tested):
  I1  a token belongs to at most one entry of its resource
  I2  an entry of a memory resource lies on exactly one GPU
  I3  the GiB used of a GPU are the sum of its entries; nothing else is kept
  I4  an entry that is not short fitted into what its GPU lent when it was made

Threading model: not thread-safe; state.py holds a lock around every call. Callers: units.py, reconcile.py,
state.py, and document.py, which writes it down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from valve_api.container import ContainerName


@dataclass(frozen=True, slots=True)
class Entry:
    """What one container was given of one resource."""

    id: int
    resource: str
    gpus: tuple[str, ...]
    units: int
    """GiB; 0 for online seats"""
    tokens: frozenset[str]
    owner: ContainerName | None = None
    shortage: int = 0
    """GiB that its GPU lent too little when the entry was made"""
    library: str = ""
    """host path of the runtime that its container mounts"""
    at_s: float = 0.0
    """Unix time"""


class Ledger:
    def __init__(self, entries: Iterable[Entry] = (), revision: int = 0) -> None:
        """entries: of a document; a token that occurs twice stays with the later one."""
        self._entries: dict[int, Entry] = {}
        self._by_token: dict[tuple[str, str], int] = {}
        self.revision = revision
        """+1 at every change"""
        self._next_id = 1
        for entry in entries:
            self.put(entry)
        self.revision = revision

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def new_id(self) -> int:
        return self._next_id

    def get(self, entry_id: int) -> Entry | None:
        return self._entries.get(entry_id)

    def holder(self, resource: str, token: str) -> Entry | None:
        """The entry that has this token."""
        found = self._by_token.get((resource, token))
        return None if found is None else self._entries[found]

    def holders(self, resource: str, tokens: Iterable[str]) -> list[Entry]:
        """The entries that have any of these tokens, oldest first."""
        ids = {self._by_token[key] for token in tokens if (key := (resource, token)) in self._by_token}
        return [self._entries[number] for number in sorted(ids)]

    def tokens(self, resource: str) -> set[str]:
        """Every token of a resource that is taken."""
        return {token for kind, token in self._by_token if kind == resource}

    def used(self, resource: str) -> dict[str, int]:
        """GiB by GPU."""
        found: dict[str, int] = {}
        for entry in self._entries.values():
            if entry.resource == resource:
                for gpu in entry.gpus:
                    found[gpu] = found.get(gpu, 0) + entry.units
        return found

    def put(self, entry: Entry) -> None:
        """Write an entry down, in place of the one with its id. Tokens that others have become its own (I1):
        an entry that loses some keeps the rest, one that loses all ends."""
        self._forget(entry.id)
        for other in self.holders(entry.resource, entry.tokens):
            rest = other.tokens - entry.tokens
            self._forget(other.id)
            if rest:
                self._write(replace(other, tokens=rest, units=min(other.units, len(rest))))
        self._write(entry)
        self.revision += 1

    def drop(self, entry_id: int) -> None:
        self._forget(entry_id)
        self.revision += 1

    def _write(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._next_id = max(self._next_id, entry.id + 1)
        for token in entry.tokens:
            self._by_token[entry.resource, token] = entry.id

    def _forget(self, entry_id: int) -> None:
        entry = self._entries.pop(entry_id, None)
        if entry is not None:
            for token in entry.tokens:
                del self._by_token[entry.resource, token]
