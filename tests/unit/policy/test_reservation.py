# SPDX-License-Identifier: Apache-2.0
"""The reservation: its arithmetic by table, its bounds by simulation of the model in its docstring."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valve_agent.policy.reservation import Reservation

TAU = 100


def reservation(**other: Any) -> Reservation:
    """min 4, max 64, factor 2, decrease 3, quiet period 100 ns, from time 0."""
    values: dict[str, Any] = {
        "min_slabs": 4,
        "max_slabs": 64,
        "increase_factor": 2.0,
        "decrease_slabs": 3,
        "quiet_period_ns": TAU,
        "now_ns": 0,
    }
    return Reservation(**(values | other))


# Each step: time, shortfall or None for a tick, expected R, expected deadline.
STORIES: dict[str, tuple[dict[str, Any], list[tuple[int, int | None, int, int | None]]]] = {
    "starts at the minimum and stays there": ({}, [(0, None, 4, None), (10_000, None, 4, None)]),
    "a small shortfall multiplies": ({}, [(10, 1, 8, 110), (20, 1, 16, 120)]),
    "a large shortfall is added instead": ({}, [(10, 9, 13, 110)]),
    "the maximum clamps": ({}, [(10, 60, 64, 110), (20, 1, 64, 120)]),
    "a quiet period takes the decrease away": (
        {},
        [(10, 9, 13, 110), (109, None, 13, 110), (110, None, 10, 210)],
    ),
    "several periods are caught up at once": ({}, [(10, 9, 13, 110), (250, None, 7, 310)]),
    "the decrease stops at the minimum": ({}, [(10, 9, 13, 110), (310, None, 4, None), (900, None, 4, None)]),
    "a shortfall starts the quiet period again": (
        {},
        [(10, 9, 13, 110), (100, 1, 26, 200), (199, None, 26, 200), (200, None, 23, 300)],
    ),
    "a shortfall catches up first": ({}, [(10, 9, 13, 110), (115, 1, 20, 215)]),
    "periods that passed at the minimum are not owed": ({}, [(950, 1, 8, 1050), (1049, None, 8, 1050)]),
    "a fraction is rounded up": ({"increase_factor": 1.5, "min_slabs": 5}, [(10, 1, 8, 110)]),
    "1.1 means eleven tenths": ({"increase_factor": 1.1, "min_slabs": 10}, [(10, 1, 11, 110)]),
    "from zero it grows all the same": ({"min_slabs": 0}, [(10, 1, 1, 110), (20, 1, 2, 120)]),
    "time that runs backwards is time that stands still": ({}, [(50, 1, 8, 150), (20, None, 8, 150)]),
    "min = max never moves": ({"max_slabs": 4}, [(10, 7, 4, None), (500, None, 4, None)]),
}


@pytest.mark.parametrize(("values", "steps"), STORIES.values(), ids=STORIES.keys())
def test_story(values: dict[str, Any], steps: list[tuple[int, int | None, int, int | None]]) -> None:
    subject = reservation(**values)
    for now, shortfall, expected, deadline in steps:
        got = subject.tick(now) if shortfall is None else subject.on_shortfall(shortfall, now)
        assert (got, subject.slabs, subject.deadline_ns()) == (expected, expected, deadline), f"at {now}"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({"min_slabs": -1}, "0 <= min <= max", id="negative minimum"),
        pytest.param({"min_slabs": 65}, "0 <= min <= max", id="bounds crossed"),
        pytest.param({"increase_factor": 1.0}, "increase_factor", id="factor that does not increase"),
        pytest.param({"increase_factor": float("nan")}, "increase_factor", id="factor that is no number"),
        pytest.param({"increase_factor": float("inf")}, "increase_factor", id="infinite factor"),
        pytest.param({"decrease_slabs": 0}, "decrease_slabs", id="no decrease"),
        pytest.param({"quiet_period_ns": 0}, "quiet_period_ns", id="no quiet period"),
    ],
)
def test_refused_settings(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reservation(**values)


@pytest.mark.parametrize("shortfall", [0, -3])
def test_no_shortfall_is_refused(shortfall: int) -> None:
    with pytest.raises(ValueError, match="report at least 1"):
        reservation().on_shortfall(shortfall, 1)


@dataclass
class Device:
    """The model: ``total`` slabs, shared by online (used), the reserve F (free) and offline."""

    reserve: Reservation
    total: int
    free: int
    now: int = 0
    used: int = 0
    demand: int = 0  # gross growth
    reclaims: list[int] = field(default_factory=list)  # times

    def __post_init__(self) -> None:
        self.offline = self.total - self.free

    def grow(self, slabs: int) -> None:
        slabs = min(slabs, self.total - self.used)  # online cannot have more than the device
        self.used += slabs
        self.demand += slabs
        if slabs <= self.free:
            self.free -= slabs
            return
        shortfall = slabs - self.free
        kept = self.reserve.on_shortfall(shortfall, self.now)
        if self.offline:
            self.reclaims.append(self.now)
        taken = min(self.offline, shortfall + kept)
        self.offline -= taken
        self.free = taken - shortfall
        assert self.free >= 0

    def release(self, slabs: int) -> None:
        slabs = min(slabs, self.used)
        self.used -= slabs
        self._keep(self.free + slabs)

    def wait(self, time: int) -> None:
        self.now += time
        self.reserve.tick(self.now)
        self._keep(self.free)

    def _keep(self, free: int) -> None:
        self.free = min(self.reserve.slabs, free)
        self.offline += free - self.free
        assert self.used + self.free + self.offline == self.total


SETTINGS = st.fixed_dictionaries(
    {
        "min_slabs": st.integers(0, 12),
        "max_slabs": st.integers(12, 80),
        "increase_factor": st.sampled_from([1.01, 1.1, 1.5, 2.0, 3.7]),
        "decrease_slabs": st.integers(1, 9),
    }
)
# An adversary's move: grow by an amount, just past the reserve, or free some.
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), st.integers(1, 100)),
        st.tuples(st.just("grow past the reserve by"), st.integers(1, 3)),
        st.tuples(st.just("free"), st.integers(1, 200)),
    ),
    max_size=80,
)


def play(device: Device, move: tuple[str, int]) -> None:
    name, amount = move
    if name == "free":
        device.release(amount)
    else:
        device.grow(amount if name == "grow" else device.free + amount)


@settings(max_examples=300, deadline=None)
@given(values=SETTINGS, moves=MOVES, total=st.integers(20, 2000), initially_free=st.integers(0, 12))
def test_no_burst_reclaims_more_often_than_its_bound(
    values: dict[str, Any], moves: list[tuple[str, int]], total: int, initially_free: int
) -> None:
    subject = reservation(**values)
    device = Device(subject, total, min(initially_free, subject.slabs, total))
    for move in moves:
        play(device, move)  # no time passes: a burst
        assert len(device.reclaims) <= subject.burst_bound(device.demand)


@settings(max_examples=200, deadline=None)
@given(values=SETTINGS, demand=st.integers(0, 3000))
def test_the_burst_bound_is_attained(values: dict[str, Any], demand: int) -> None:
    """By growing one more than the reserve, every time, as long as the demand lasts."""
    subject = reservation(**values)
    bound = subject.burst_bound(demand)
    device = Device(subject, total=10_000, free=0)
    while device.demand + device.free + 1 <= demand:
        device.grow(device.free + 1)
    assert len(device.reclaims) == bound


@settings(max_examples=300, deadline=None)
@given(values=SETTINGS, demand=st.integers(0, 5000))
def test_the_closed_forms_hold(values: dict[str, Any], demand: int) -> None:
    subject = reservation(**values)
    low, high, factor = subject.min_slabs, subject.max_slabs, subject.increase_factor
    if low < 1:
        return
    bound = subject.burst_bound(demand)
    if demand <= high:
        assert bound <= max(1, ceil_log(factor, Fraction(max(demand, 1), low)))
    assert bound <= max(1, ceil_log(factor, Fraction(high, low))) + demand / (high + 1)


def ceil_log(base: Fraction, value: Fraction) -> int:
    """The least n with base**n >= value, exactly."""
    power, exponent = Fraction(1), 0
    while power < value:
        power, exponent = power * base, exponent + 1
    return exponent


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        pytest.param(0, 0, id="no demand, no reclaim"),
        pytest.param(1, 1, id="one slab, where the log formula says none"),
        pytest.param(9, 1, id="the reserve of 8 absorbs 8 more"),
        pytest.param(10, 2, id="the ninth is a second reclaim"),
        pytest.param(1 + 9 + 17 + 33 + 65, 5, id="8, 16, 32, 64"),
        pytest.param(1 + 9 + 17 + 33 + 65 * 100, 104, id="beyond max: one for every 65 slabs, no logarithm"),
    ],
)
def test_burst_bound_by_hand(demand: int, expected: int) -> None:
    assert reservation().burst_bound(demand) == expected


TIMED_MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("grow past the reserve by"), st.integers(1, 3)),
        st.tuples(st.just("grow"), st.integers(1, 100)),
        st.tuples(st.just("free"), st.integers(1, 200)),
        st.tuples(st.just("wait"), st.integers(1, TAU)),
        st.tuples(st.just("wait"), st.just(TAU)),
        st.tuples(st.just("wait"), st.integers(TAU, 20 * TAU)),
    ),
    max_size=150,
)


def constant(subject: Reservation) -> float:
    """What a finite run may have on top of the long-run rate (the docstring's constant)."""
    return 2 + subject.max_slabs - subject.min_slabs


@settings(max_examples=300, deadline=None)
@given(values=SETTINGS, moves=TIMED_MOVES)
def test_the_long_run_bound_with_a_known_growth_rate(
    values: dict[str, Any], moves: list[tuple[str, int]]
) -> None:
    subject = reservation(**values)
    device = Device(subject, total=1000, free=0)
    for move in moves:
        if move[0] == "wait":
            device.wait(move[1])
        else:
            play(device, move)
    if device.now == 0:
        return
    seconds = device.now / 1e9
    bound = subject.long_run_bound_per_second(device.demand / seconds)
    assert len(device.reclaims) <= bound * seconds + constant(subject)


@settings(max_examples=300, deadline=None)
@given(values=SETTINGS, moves=TIMED_MOVES)
def test_the_long_run_bound_for_demand_within_max_per_quiet_period(
    values: dict[str, Any], moves: list[tuple[str, int]]
) -> None:
    subject = reservation(**values)
    device = Device(subject, total=1000, free=0)
    grown: list[tuple[int, int]] = []
    for move in moves:
        if move[0] == "wait":
            device.wait(move[1])
            continue
        before = device.demand
        lately = sum(slabs for at, slabs in grown if at >= device.now - TAU)
        if move[0] == "free":
            play(device, move)
        else:
            amount = move[1] + (device.free if move[0] != "grow" else 0)
            device.grow(min(amount, subject.max_slabs - lately))
        grown.append((device.now, device.demand - before))
    seconds = device.now / 1e9
    assert len(device.reclaims) <= subject.long_run_bound_per_second() * seconds + constant(subject)


def adversary(subject: Reservation, periods: int) -> Device:
    """Frees all, grows one past the reserve as often as it may, waits for one decrease."""
    device = Device(subject, total=10 * subject.max_slabs, free=0)
    for _ in range(periods):
        left = subject.max_slabs
        while device.free + 1 <= left:
            left -= device.free + 1
            device.grow(device.free + 1)
        device.release(device.used)
        device.wait(TAU + 1)
    return device


def test_the_long_run_bound_is_attained_and_the_usual_formula_is_none() -> None:
    subject = reservation(decrease_slabs=1)
    device = adversary(subject, 1000)
    rate = len(device.reclaims) / (device.now / 1e9)
    bound = subject.long_run_bound_per_second()
    usual = subject.decrease_slabs / ((1 - 1 / 2.0) * subject.max_slabs) / (TAU / 1e9)
    assert 20 * usual < rate
    assert 0.95 * bound < rate < 1.05 * bound


def test_a_demand_without_pause_costs_a_reclaim_for_every_max() -> None:
    subject = reservation()
    device = Device(subject, total=1000, free=0)
    for step in range(20_000):
        device.grow(device.free + 1)
        if step % 10 == 9:
            device.release(device.used)
            device.wait(1)
    rate = len(device.reclaims) / (device.now / 1e9)
    growth = device.demand / (device.now / 1e9)
    assert growth / (subject.max_slabs + 1) <= rate <= subject.long_run_bound_per_second(growth) * 1.001


def test_the_long_run_bound_is_finite_for_any_growth_rate() -> None:
    subject = reservation()
    assert subject.long_run_bound_per_second(0.0) == 0
    assert math.isfinite(subject.long_run_bound_per_second(1e12))
    assert subject.long_run_bound_per_second(5.0) == pytest.approx(1.0)  # more than 4 slabs for each
