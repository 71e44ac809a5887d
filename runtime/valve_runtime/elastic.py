# SPDX-License-Identifier: Apache-2.0
"""What every engine plugin needs to live on memory that comes and goes.

* ``Link``: what a plugin asks of libvalve (``_lib.Valve`` offers it; tests offer a fake).
* ``ElasticPool``: which KV blocks are usable, from the stream of granted and lost slabs.
* ``Demand``: how many slabs to ask for and when to give some back.
* ``DecodeGap``: the longest recent gap between decode iterations.
* ``Ledger``: publishes which request owns which slab.

Threading: an ElasticPool, a Demand and a Ledger belong to the thread that schedules the
engine. ``ElasticPool.usable``, ``held`` and ``Demand.raise_to`` may be read and called from
any thread. Time is an argument (seconds of ``time.monotonic()``). No engine is imported here.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from valve_runtime.geometry import Geometry

logger = logging.getLogger("valve")

GRANTED = 1  # enum valve_event_kind
LOST = 2

REQUESTS_MAX = 1024  # VALVE_REQUESTS_MAX
SLACK_SLABS = 1  # asked for on top, and not called a surplus: blocks and slabs do not end together
COUNT_REQUESTS, COUNT_TOKENS, COUNT_RECOMPUTED, COUNT_LOST_BLOCKS, COUNT_RECOMPUTED_TOKENS = range(5)


class RuntimeFault(Exception):
    """Root of what a plugin can raise; each message tells the operator what to do."""


class EngineUnsupported(RuntimeFault):
    """The engine lacks a hook that this plugin needs."""


class ArenaRefused(RuntimeFault):
    """The agent did not give this process an arena or its first slabs."""


class Link(Protocol):
    """libvalve as a plugin uses it. Never blocks, except ``arena_open``."""

    def busy(self) -> None: ...
    def idle(self, decode_gap_ns: int) -> None: ...
    def count(self, counter: int, n: int) -> None: ...
    def want(self, total_slabs: int, urgent: bool) -> None: ...
    def give_back(self, slab: int) -> bool: ...
    def poll(self) -> tuple[int, int] | None:
        """The next event (kind, slab), or None."""

    def ledger_begin(self) -> bool: ...
    def ledger_request(self, slot: int, tokens: int) -> None: ...
    def ledger_own(self, slab: int, slot: int) -> None: ...
    def ledger_pin(self, slab: int) -> None: ...
    def ledger_commit(self) -> None: ...


@dataclass
class Change:
    """Blocks to take from the engine (their contents are gone) and blocks it may use again.
    A block can be in both: lost, and granted again before the engine looked."""

    lost: set[int] = field(default_factory=set)
    gained: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.lost or self.gained)


class ElasticPool:
    """Which blocks are usable. ``pinned`` blocks (an engine's null or trash blocks) are never
    given to the engine's allocator and never returned; their slabs are ``pinned_slabs``."""

    def __init__(self, geometry: Geometry, pinned: Iterable[int] = ()) -> None:
        self.geometry = geometry
        self.pinned = frozenset(pinned)
        self.pinned_slabs = frozenset(s for b in self.pinned for s in geometry.slabs_of[b])
        self.held: set[int] = set()
        self._missing = [len(slabs) for slabs in geometry.slabs_of]
        self.usable = 0  # usable blocks, pinned ones not counted

    def is_usable(self, block: int) -> bool:
        return self._missing[block] == 0

    def apply(self, events: Iterable[tuple[int, int]]) -> Change:
        """Take granted and lost slabs into account, in the order they happened."""
        change = Change()
        for kind, slab in events:
            if kind == GRANTED:
                self._grant(slab, change)
            elif kind == LOST:
                self._lose(slab, change)
        return change

    def _grant(self, slab: int, change: Change) -> None:
        if slab in self.held:
            return
        self.held.add(slab)
        for block in self.geometry.blocks_of[slab]:
            self._missing[block] -= 1
            if self._missing[block] == 0 and block not in self.pinned:
                change.gained.add(block)
                self.usable += 1

    def _lose(self, slab: int, change: Change) -> None:
        if slab not in self.held:
            return
        self.held.discard(slab)
        for block in self.geometry.blocks_of[slab]:
            if self._missing[block] == 0 and block not in self.pinned:
                self.usable -= 1
                if block in change.gained and block not in change.lost:
                    # Granted and lost since the engine last looked: it never saw the block.
                    change.gained.discard(block)
                else:
                    change.gained.discard(block)
                    change.lost.add(block)
            self._missing[block] += 1

    def give_up(self, slab: int) -> list[int]:
        """Account for a slab that the caller is about to return; the blocks that are no longer
        usable. The caller has made sure that none of them is in use."""
        change = Change()
        self._lose(slab, change)
        return sorted(change.lost)

    def returnable(self, free: Iterable[int], most: int) -> list[int]:
        """Up to ``most`` slabs, highest first, all of whose usable blocks are in ``free``.
        Slabs that make no block usable come first: they are worth nothing to the engine."""
        free_set = set(free)
        useless: list[int] = []
        idle: list[int] = []
        for slab in sorted(self.held - self.pinned_slabs, reverse=True):
            usable = [b for b in self.geometry.blocks_of[slab] if self._missing[b] == 0]
            if not usable:
                useless.append(slab)
            elif all(b in free_set for b in usable):
                idle.append(slab)
        return (useless + idle)[:most]


@dataclass(frozen=True)
class DemandSettings:
    """Defaults suit engines whose steps take 1 to 200 ms."""

    floor_blocks: int = 1  # never return below this
    idle_return_s: float = 1.0  # a surplus must have lasted this long
    return_slabs: int = 16  # most slabs returned at once...
    return_every_s: float = 0.1  # ...this often
    repeat_s: float = 0.5  # an unfulfilled want is said again
    urgent: bool = False  # online: requests wait for the memory


class Demand:
    """Turns "the engine could use n blocks" into WANT messages and returns.

    Rising demand is passed on at once; falling demand only after ``idle_return_s`` and in
    steps, so that a lull between two requests does not make memory travel back and forth.
    """

    def __init__(self, link: Link, pool: ElasticPool, settings: DemandSettings) -> None:
        self._link = link
        self._pool = pool
        self._settings = settings
        self._lock = threading.Lock()
        self._wanted = 0  # slabs, as the agent last heard
        self._said_at = float("-inf")
        self._surplus_since: float | None = None
        self._returned_at = float("-inf")

    @property
    def wanted(self) -> int:
        return self._wanted

    def slabs_for(self, blocks: int) -> int:
        """Slabs to hold so that ``blocks`` blocks are usable, beside the pinned ones. Counted
        from what is held, because that may be in pieces: a piece can carry fewer whole blocks."""
        geometry, pool = self._pool.geometry, self._pool
        short = min(blocks, geometry.blocks - len(pool.pinned)) - pool.usable
        if geometry.scattered:
            return geometry.slabs_used
        per_block = geometry.slabs_used / geometry.blocks
        held = len(pool.held)
        if short > 0:
            missing_pins = len(pool.pinned_slabs - pool.held)
            return min(geometry.slabs_used, held + missing_pins + math.ceil(short * per_block) + SLACK_SLABS)
        return max(len(pool.pinned_slabs), held - int(-short * per_block))

    def raise_to(self, blocks: int, now: float, *, urgent: bool) -> None:
        """Ask for enough for ``blocks`` blocks if the agent has not heard of it. Any thread."""
        slabs = self.slabs_for(max(blocks, self._settings.floor_blocks))
        with self._lock:
            unfulfilled = len(self._pool.held) < slabs and now - self._said_at >= self._settings.repeat_s
            if slabs <= self._wanted and not unfulfilled:
                return
            self._wanted = max(slabs, self._wanted)
            self._said_at = now
            self._surplus_since = None
            wanted = self._wanted
        self._link.want(wanted, urgent)

    def enough_for(self, blocks: int) -> int:
        """Slabs that ``surplus`` leaves when ``blocks`` blocks are enough."""
        return self.slabs_for(max(blocks, self._settings.floor_blocks)) + SLACK_SLABS

    def has_surplus(self, blocks: int) -> bool:
        """Whether ``surplus`` has something to do: slabs that are held, or only asked for still."""
        return max(len(self._pool.held), self._wanted) > self.enough_for(blocks)

    def surplus(self, blocks: int, now: float) -> int:
        """Slabs to return now, given that ``blocks`` blocks are enough; 0 while it is too early.
        Tells the agent of the lower want when it is time."""
        target = self.enough_for(blocks)
        if not self.has_surplus(blocks):
            self._surplus_since = None
            return 0
        if self._surplus_since is None:
            self._surplus_since = now
        if now - self._surplus_since < self._settings.idle_return_s:
            return 0
        if now - self._returned_at < self._settings.return_every_s:
            return 0
        self._returned_at = now
        with self._lock:
            lower = target < self._wanted
            if lower:
                self._wanted = target
                self._said_at = now
        if lower:
            self._link.want(target, False)
        return min(self._settings.return_slabs, max(0, len(self._pool.held) - target))


def drain_events(link: Link) -> list[tuple[int, int]]:
    """Everything that happened to the arena since the last call."""
    events = []
    while (event := link.poll()) is not None:
        events.append(event)
    return events


def await_pinned(link: Link, pool: ElasticPool, settings: DemandSettings) -> None:
    """Wait until the pinned blocks are real: before the engine's first step. Offline waits for memory
    as long as it takes (it has nothing better to do); online is granted at once or not at all.
    Raises ArenaRefused."""
    demand = Demand(link, pool, settings)
    started = said = time.monotonic()
    while not pool.pinned_slabs <= pool.held:
        now = time.monotonic()
        demand.raise_to(1, now, urgent=settings.urgent)
        pool.apply(drain_events(link))
        if settings.urgent and now - started > 10:
            raise ArenaRefused("the agent granted no device memory within 10 s.")
        if now - said > 10:
            said = now
            logger.warning("valve: waiting for the first slabs of device memory")
        time.sleep(0.001)


class DecodeGap:
    """Longest gap between two consecutive decode iterations within the last ``window_s``."""

    def __init__(self, window_s: float = 30.0) -> None:
        self._window_s = window_s
        self._last: float | None = None
        self._gaps: deque[tuple[float, float]] = deque()  # (when, gap), gaps falling: a max queue

    def iteration(self, now: float) -> None:
        """One iteration of a busy engine ended."""
        if self._last is not None:
            gap = now - self._last
            while self._gaps and self._gaps[-1][1] <= gap:
                self._gaps.pop()
            self._gaps.append((now, gap))
        self._last = now

    def rest(self) -> None:
        """The engine went idle: the time until the next iteration is no gap."""
        self._last = None

    def longest_ns(self, now: float) -> int:
        while self._gaps and now - self._gaps[0][0] > self._window_s:
            self._gaps.popleft()
        return int(self._gaps[0][1] * 1e9) if self._gaps else 0


class Ledger:
    """Publishes the owners of slabs: one slot per running request. Requests beyond the
    ledger's last slot share it, which makes their slabs look dearer, never cheaper."""

    def __init__(self, link: Link, pool: ElasticPool) -> None:
        self._link = link
        self._pool = pool
        self._slabs_cache: dict[str, tuple[int, list[int]]] = {}

    def forget(self, request: str) -> None:
        """The request lost its blocks; whatever it gets next is a new list."""
        self._slabs_cache.pop(request, None)

    def publish(self, owners: Sequence[tuple[str, int, Sequence[int]]]) -> None:
        """``owners``: (request id, tokens to recompute, its blocks in order).
        A request's list only grows until ``forget``."""
        link = self._link
        if not link.ledger_begin():
            return
        slabs_of = self._pool.geometry.slabs_of
        for slab in self._pool.pinned_slabs:
            link.ledger_pin(slab)
        cache: dict[str, tuple[int, list[int]]] = {}
        own = link.ledger_own
        for index, (request, tokens, blocks) in enumerate(owners):
            slot = min(index, REQUESTS_MAX - 1)
            link.ledger_request(slot, tokens)
            known, slabs = self._slabs_cache.get(request, (0, []))
            if known > len(blocks):
                known, slabs = 0, []
            for block in blocks[known:]:
                slabs.extend(s for s in slabs_of[block] if s not in slabs[-4:])
            cache[request] = (len(blocks), slabs)
            for slab in slabs:
                own(slab, slot)
        self._slabs_cache = cache
        link.ledger_commit()
