# SPDX-License-Identifier: Apache-2.0
"""Memory that the agent shares with a runtime: the page and the ownership ledger.

Why it exists: the hot paths do not go over the socket. A runtime says busy/idle in its page, and
says which request owns which slab in its ledger; the agent reads both while the runtime may be
stopped anywhere, even in the middle of a store.

Threading model: a view has one user thread; the other side is another process. Every field has one
writer. Sizes are sealed, so that a tenant cannot shrink a mapping under the agent. Callers: gate.py
(Page), registry.py (both), pool.py (Ledger), the tests' fake agent.

    SharedMemoryError      a descriptor is not the memory that it should be
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Any

from valve_agent.wire import BITMAP_WORDS, MAGIC, REQUESTS_MAX, SLABS_MAX, VERSION_MAX

PAGE_BYTES = 4096
LEDGER_HEADER_BYTES = 64
_TOKENS_BYTES = 4 * REQUESTS_MAX
_PINNED_BYTES = 8 * BITMAP_WORDS
_OWNERS_BYTES = REQUESTS_MAX // 8
_F_ADD_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033)
_F_GET_SEALS = getattr(fcntl, "F_GET_SEALS", 1034)
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 1, 2, 4
_READ_ATTEMPTS = 8


class SharedMemoryError(Exception):
    """A descriptor is not the memory that it should be; refuse the peer that sent it."""


class Gate(enum.IntEnum):
    UNKNOWN = 0
    OPEN = 1
    PAUSED = 2


class PageLayout(ctypes.LittleEndianStructure):
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint16),
        ("reserved0", ctypes.c_uint16),
        ("heartbeat_ns", ctypes.c_uint64),
        ("gate", ctypes.c_uint32),
        ("reserved1", ctypes.c_uint32),
        ("memory_limit_bytes", ctypes.c_uint64),
        ("agent_reserved", ctypes.c_uint8 * 32),
        ("busy", ctypes.c_uint32),
        ("busy_seq", ctypes.c_uint32),
        ("busy_since_ns", ctypes.c_uint64),
        ("decode_gap_ns", ctypes.c_uint64),
        ("requests", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("recomputed", ctypes.c_uint64),
        ("lost_blocks", ctypes.c_uint64),
        ("recomputed_tokens", ctypes.c_uint64),
        ("direct_bytes", ctypes.c_uint64),
        ("runtime_reserved", ctypes.c_uint8 * 3960),
    )


class LedgerLayout(ctypes.LittleEndianStructure):
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
        ("slabs", ctypes.c_uint32),
        ("active", ctypes.c_uint32),
        ("updates", ctypes.c_uint64),
        ("base", ctypes.c_uint64),
        ("unused", ctypes.c_uint8 * 32),
    )


def _sealed_memfd(name: str, size_bytes: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW | _SEAL_SEAL)
    return fd


def _map(fd: int, size_bytes: int, what: str) -> mmap.mmap:
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError as error:
        raise SharedMemoryError(f"{what}: the descriptor is no memory file that Valve made") from error
    if not seals & _SEAL_SHRINK:
        raise SharedMemoryError(f"{what}: the memory file is not sealed against shrinking")
    actual = os.fstat(fd).st_size
    if actual < size_bytes:
        raise SharedMemoryError(f"{what}: {actual} bytes where {size_bytes} are needed")
    try:
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:  # sealed against writing, or opened for reading only
        raise SharedMemoryError(f"{what}: the memory file cannot be mapped: {error.strerror}") from error


class Page:
    """The page of one connection. Attributes read and write the shared memory directly.

    Each access is one aligned load or store; a group of fields is not one snapshot (compare
    `busy_seq` before and after where that matters).
    """

    def __init__(self, fd: int) -> None:
        """Map the page in `fd` (not consumed). Raises SharedMemoryError."""
        self._map = _map(fd, PAGE_BYTES, "page")
        self._at: Any = PageLayout.from_buffer(self._map)

    @staticmethod
    def create() -> tuple[int, Page]:
        """A new page: (descriptor for the peer, owned by the caller; view)."""
        fd = _sealed_memfd("valve-page", PAGE_BYTES)
        page = Page(fd)
        page._at.magic = MAGIC
        page._at.version = VERSION_MAX
        return fd, page

    def close(self) -> None:
        self._at = None
        self._map.close()

    @property
    def heartbeat_ns(self) -> int:
        return int(self._at.heartbeat_ns)

    @heartbeat_ns.setter
    def heartbeat_ns(self, value: int) -> None:
        self._at.heartbeat_ns = value

    @property
    def gate(self) -> int:
        return int(self._at.gate)

    @gate.setter
    def gate(self, value: int) -> None:
        self._at.gate = value

    @property
    def memory_limit_bytes(self) -> int:
        """GPU memory that the process may have, its arena included; 0: any amount."""
        return int(self._at.memory_limit_bytes)

    @memory_limit_bytes.setter
    def memory_limit_bytes(self, value: int) -> None:
        self._at.memory_limit_bytes = value

    @property
    def direct_bytes(self) -> int:
        """GPU memory that the process says it allocated beside its arena."""
        return int(self._at.direct_bytes)

    @property
    def busy(self) -> bool:
        return bool(self._at.busy)

    @property
    def busy_seq(self) -> int:
        return int(self._at.busy_seq)

    @property
    def busy_since_ns(self) -> int:
        return int(self._at.busy_since_ns)

    @property
    def decode_gap_ns(self) -> int:
        return int(self._at.decode_gap_ns)

    @property
    def requests(self) -> int:
        return int(self._at.requests)

    @property
    def tokens(self) -> int:
        return int(self._at.tokens)

    @property
    def recomputed(self) -> int:
        return int(self._at.recomputed)

    @property
    def lost_blocks(self) -> int:
        return int(self._at.lost_blocks)

    @property
    def recomputed_tokens(self) -> int:
        return int(self._at.recomputed_tokens)


def ledger_copy_bytes(slabs: int) -> int:
    return _TOKENS_BYTES + _PINNED_BYTES + slabs * _OWNERS_BYTES


def ledger_bytes(slabs: int) -> int:
    return LEDGER_HEADER_BYTES + 2 * ledger_copy_bytes(slabs)


@dataclass(frozen=True, slots=True)
class LedgerCopy:
    """One whole copy of a ledger, as it stood at update number `updates`."""

    updates: int
    slabs: int
    tokens: tuple[int, ...]
    """tokens[r]: tokens to recompute if request slot r is lost (0: free slot or nothing to lose)."""
    pinned: int
    """Bit s: slab s must never be reclaimed."""
    owners: tuple[int, ...]
    """owners[s], bit r: request slot r owns part of slab s."""


class Ledger:
    """A ledger as the agent reads it; the runtime is its only writer."""

    def __init__(self, fd: int, slabs: int) -> None:
        """Map the ledger in `fd` (not consumed). Raises SharedMemoryError."""
        if not 0 < slabs <= SLABS_MAX:
            raise SharedMemoryError(f"ledger: {slabs} slabs; an arena has 1..{SLABS_MAX}")
        self.slabs = slabs
        self._map = _map(fd, ledger_bytes(slabs), "ledger")
        self._at: Any = LedgerLayout.from_buffer(self._map)

    @staticmethod
    def create(slabs: int) -> tuple[int, Ledger]:
        """A new, empty ledger: (descriptor for the peer, owned by the caller; view)."""
        fd = _sealed_memfd("valve-ledger", ledger_bytes(slabs))
        ledger = Ledger(fd, slabs)
        ledger._at.magic = MAGIC
        ledger._at.version = VERSION_MAX
        ledger._at.slabs = slabs
        return fd, ledger

    def close(self) -> None:
        self._at = None
        self._map.close()

    @property
    def updates(self) -> int:
        return int(self._at.updates)

    @property
    def base(self) -> int:
        """Where the arena lies in the process; 0 on a device whose agent need not know."""
        return int(self._at.base)

    def read(self) -> LedgerCopy:
        """The copy in force. Raises SharedMemoryError if the writer outpaces the reader (a stopped
        writer never does)."""
        size = ledger_copy_bytes(self.slabs)
        for _ in range(_READ_ATTEMPTS):
            before = self.updates
            start = LEDGER_HEADER_BYTES + (self._at.active & 1) * size
            raw = self._map[start : start + size]
            if self.updates == before:
                tokens = memoryview(raw)[:_TOKENS_BYTES].cast("I")
                first = _TOKENS_BYTES + _PINNED_BYTES
                pinned = int.from_bytes(raw[_TOKENS_BYTES:first], "little")
                owners = tuple(
                    [
                        int.from_bytes(raw[at : at + _OWNERS_BYTES], "little")
                        for at in range(first, len(raw), _OWNERS_BYTES)
                    ]
                )
                return LedgerCopy(before, self.slabs, tuple(tokens), pinned, owners)
        raise SharedMemoryError(f"the ledger changed {_READ_ATTEMPTS} times while it was read")
