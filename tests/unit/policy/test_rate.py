# SPDX-License-Identifier: Apache-2.0
"""The rate meter and the rate limit against plain counting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valve_agent.policy.rate import MINUTE_NS, RateLimit, RateMeter

STEPS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_the_meter_counts_the_window_up_to_one_bucket(steps: list[tuple[int, int]]) -> None:
    meter = RateMeter(window_ns=600)  # buckets of 10
    now, events = 5, []
    for wait, count in steps:
        now += wait
        meter.add(now, count)
        events += [now] * count
        sure = sum(1 for at in events if at > now - 600)
        possible = sum(1 for at in events if at > now - 610)
        assert sure <= meter.recent(now) <= possible
        assert meter.total == len(events)
    assert meter.recent(now + 610) == 0


def test_the_meter_is_small_however_many_events_there_are() -> None:
    meter = RateMeter()
    for number in range(10_000):
        meter.add(number * MINUTE_NS // 1000)
    assert len(meter._buckets) <= 62
    assert 1000 <= meter.recent(9_999 * MINUTE_NS // 1000) <= 1017


def test_per_minute_scales_the_window() -> None:
    meter = RateMeter(window_ns=MINUTE_NS // 2)
    meter.add(0, 3)
    assert meter.per_minute(1) == 6


def test_the_meter_survives_time_that_runs_backwards() -> None:
    meter = RateMeter(window_ns=600)
    meter.add(1000)
    meter.add(3)
    assert meter.recent(1000) == 2
    assert meter.recent(2000) == 0


def test_a_negative_number_of_events_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot happen"):
        RateMeter().add(0, -1)


def test_a_window_too_small_for_its_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 60"):
        RateMeter(window_ns=59)


@settings(max_examples=200, deadline=None)
@given(
    per_minute=st.integers(0, 50),
    burst=st.integers(1, 5),
    waits=st.lists(st.none() | st.integers(0, MINUTE_NS // 5), max_size=60),
)
def test_no_span_allows_more_than_the_limit(per_minute: int, burst: int, waits: list[int | None]) -> None:
    limit = RateLimit(per_minute, burst, now_ns=0)
    now, allowed = 0, []
    for wait in waits:
        deadline = limit.deadline_ns()
        if wait is not None:
            now += wait
        elif deadline is not None and deadline > now:
            assert not limit.allow(deadline - 1)
            now = deadline
        said = limit.allow(now)
        assert said == (deadline is not None and now >= deadline), "the deadline is exact"
        if said:
            allowed.append(now)
    for first in range(len(allowed)):
        for last in range(first, len(allowed)):
            span = allowed[last] - allowed[first]
            assert (last - first + 1) * MINUTE_NS <= burst * MINUTE_NS + per_minute * span


def test_the_limit_is_reached() -> None:
    limit = RateLimit(per_minute=6, burst=2, now_ns=0)
    second = MINUTE_NS // 60
    assert [limit.allow(0) for _ in range(3)] == [True, True, False]
    assert limit.deadline_ns() == 10 * second
    assert [limit.allow(10 * second - 1), limit.allow(10 * second)] == [False, True]
    assert [limit.allow(1000 * second) for _ in range(3)] == [True, True, False], "credit ends at the burst"


def test_a_limit_of_zero_allows_the_first_burst_only() -> None:
    limit = RateLimit(per_minute=0, burst=1, now_ns=0)
    assert limit.allow(0)
    assert limit.deadline_ns() is None
    assert not limit.allow(100 * MINUTE_NS)


@pytest.mark.parametrize(
    ("per_minute", "burst", "words"),
    [
        pytest.param(-1, 1, "per_minute", id="negative rate"),
        pytest.param(1, 0, "burst", id="no burst"),
    ],
)
def test_refused_limits(per_minute: int, burst: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RateLimit(per_minute, burst, 0)
