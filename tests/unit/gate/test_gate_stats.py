# SPDX-License-Identifier: Apache-2.0
"""The latency ring between the gate and main."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from valve_agent import gate_stats
from valve_agent.gate_stats import BUCKETS_US, SAMPLES, StatsReader, StatsWriter


@pytest.fixture
def ring() -> Iterator[tuple[StatsWriter, StatsReader]]:
    fd = gate_stats.create()
    reader = StatsReader(fd)
    yield StatsWriter(fd), reader
    os.close(fd)
    reader.close()


def test_an_empty_ring_has_nothing(ring: tuple[StatsWriter, StatsReader]) -> None:
    stats = ring[1].read()
    assert set(stats.counters.values()) == {0}
    assert stats.latency_ns == stats.stop_ns == ()


@pytest.mark.parametrize("written", [1, SAMPLES - 1, SAMPLES, SAMPLES + 10, 3 * SAMPLES])
def test_the_newest_samples_are_kept_in_order(ring: tuple[StatsWriter, StatsReader], written: int) -> None:
    writer, reader = ring
    for index in range(written):
        writer.sample(1000 * index, index)
    stats = reader.read()
    first = max(0, written - SAMPLES + 1)
    assert stats.stop_ns == tuple(range(first, written))
    assert stats.latency_ns == tuple(1000 * index for index in range(first, written))
    assert stats.counters["samples"] == sum(stats.buckets) == written
    assert stats.counters["latency_ns"] == sum(1000 * index for index in range(written))


@pytest.mark.parametrize(
    ("latency_us", "bucket"),
    [(0, 0), (50, 0), (50.001, 1), (1000, 8), (1001, 9), (BUCKETS_US[-1] + 1, len(BUCKETS_US))],
)
def test_a_bound_belongs_to_its_bucket(
    ring: tuple[StatsWriter, StatsReader], latency_us: float, bucket: int
) -> None:
    writer, reader = ring
    writer.sample(round(latency_us * 1000), 0)
    assert reader.read().buckets.index(1) == bucket


def test_counters_by_name(ring: tuple[StatsWriter, StatsReader]) -> None:
    writer, reader = ring
    writer.count("kills")
    writer.count("missed_busy", 5)
    counters = reader.read().counters
    assert (counters["kills"], counters["missed_busy"], counters["pauses"]) == (1, 5, 0)
