# SPDX-License-Identifier: Apache-2.0
"""Preemption latency in memory that the gate writes and the agent's main process reads.

Why it exists: metrics must never make the gate wait, so it only stores words into a shared ring.

Threading model: one writer (the gate's thread), any readers in main. Every word is stored whole; a reader
drops the samples that were overwritten while it copied. Callers: gate.py (StatsWriter), gate_link.py.
Standard library only.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from typing import NamedTuple

SAMPLES = 4096
BUCKETS_US = (50, 100, 150, 200, 300, 400, 600, 800, 1000, 1500, 2000, 5000, 10_000, 100_000)
"""Upper bounds of the latency histogram; the last bucket of the counts is everything above."""
COUNTERS = (
    "samples",  # busy transitions that stopped offline: entries of the ring ever written
    "latency_ns",  # their sum
    "pauses",  # running -> paused and confirmed, whatever the reason
    "resumes",
    "missed_busy",  # busy periods that began and ended between two looks
    "violations",  # paused processes that somebody else continued
    "timeouts",  # pauses that were not confirmed at the first attempt
    "kills",  # processes killed because they could not be paused
    "events_dropped",  # main did not read them in time
    "bad_clocks",  # busy_since_ns that no honest runtime writes: no sample
)
_BUCKET_AT = len(COUNTERS)
_RING_AT = 64
BYTES = (_RING_AT + 2 * SAMPLES) * 8
_INDEX = {name: index for index, name in enumerate(COUNTERS)}


class GateStats(NamedTuple):
    """A snapshot. Latencies run from the engine's busy_since_ns to evicted; stops from the gate's wake-up."""

    counters: dict[str, int]
    buckets: tuple[int, ...]
    """Not cumulative; buckets[i] counts latencies <= BUCKETS_US[i], the last one those above."""
    latency_ns: tuple[int, ...]
    stop_ns: tuple[int, ...]


def create() -> int:
    """A memory file for one gate; the descriptor belongs to the caller."""
    fd = os.memfd_create("valve-gate-stats", os.MFD_CLOEXEC)
    os.ftruncate(fd, BYTES)
    return fd


class StatsWriter:
    def __init__(self, fd: int) -> None:
        self._words = memoryview(mmap.mmap(fd, BYTES)).cast("B").cast("Q")

    def count(self, name: str, amount: int = 1) -> None:
        self._words[_INDEX[name]] += amount

    def sample(self, latency_ns: int, stop_ns: int) -> None:
        words = self._words
        at = _RING_AT + 2 * (words[0] % SAMPLES)
        words[at] = latency_ns
        words[at + 1] = stop_ns
        words[1] += latency_ns
        words[_BUCKET_AT + bisect_left(BUCKETS_US, latency_ns / 1000)] += 1
        words[0] += 1


class StatsReader:
    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, BYTES, prot=mmap.PROT_READ)
        self._words = memoryview(self._map).cast("B").cast("Q")

    def read(self) -> GateStats:
        words = self._words
        before = words[0]
        ring = words[_RING_AT:].tolist()
        copied = words[:_RING_AT].tolist()
        after = copied[0]
        first = max(0, after - SAMPLES + 1)  # +1: the writer may be inside the next one
        kept = [index % SAMPLES for index in range(first, before)]
        return GateStats(
            counters=dict(zip(COUNTERS, copied, strict=False)),
            buckets=tuple(copied[_BUCKET_AT : _BUCKET_AT + len(BUCKETS_US) + 1]),
            latency_ns=tuple(ring[2 * index] for index in kept),
            stop_ns=tuple(ring[2 * index + 1] for index in kept),
        )

    def close(self) -> None:
        self._words.release()
        self._map.close()
