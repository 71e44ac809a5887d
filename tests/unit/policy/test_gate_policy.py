# SPDX-License-Identifier: Apache-2.0
"""The gate rule: a table of stories, and a state machine over arbitrary interleavings."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from valve_agent.policy.gate import GAP_WINDOW_NS, Action, GatePolicy, _Gaps

PAUSE, RESUME, NONE = Action.PAUSE, Action.RESUME, Action.NONE
MIN, MAX, GRACE = 10, 1000, 50


def running_gate() -> GatePolicy:
    """A gate at time 100 that lets offline run: factor 2, cooldown 10 to 1000."""
    gate = GatePolicy(2.0, MIN, MAX, GRACE, now_ns=0)
    assert gate.tick(100) is RESUME
    return gate


# Each step: time, method, arguments, expected answer. The gate runs offline at time 100.
STORIES = {
    "one request: pause at once, resume one cooldown after its end": [
        (200, "busy", ("a",), PAUSE),
        (300, "idle", ("a", 20), NONE),
        (339, "tick", (), NONE),
        (340, "tick", (), RESUME),
    ],
    "a request within the cooldown pauses nothing again": [
        (200, "busy", ("a",), PAUSE),
        (300, "idle", ("a", 20), NONE),
        (320, "busy", ("a",), NONE),
        (400, "idle", ("a", 20), NONE),
        (439, "tick", (), NONE),
        (440, "tick", (), RESUME),
    ],
    "two engines: only when both are idle": [
        (200, "busy", ("a",), PAUSE),
        (210, "busy", ("b",), NONE),
        (220, "idle", ("a", 0), NONE),
        (900, "tick", (), NONE),
        (910, "idle", ("b", 0), NONE),
        (920, "tick", (), RESUME),
    ],
    "double busy needs one idle": [
        (200, "busy", ("a",), PAUSE),
        (201, "busy", ("a",), NONE),
        (210, "idle", ("a", 0), NONE),
        (220, "tick", (), RESUME),
    ],
    "double idle does not lengthen the cooldown": [
        (200, "busy", ("a",), PAUSE),
        (210, "idle", ("a", 0), NONE),
        (215, "idle", ("a", 400), NONE),
        (220, "tick", (), RESUME),
    ],
    "idle before busy changes nothing": [
        (200, "idle", ("a", 400), NONE),
        (210, "busy", ("a",), PAUSE),
    ],
    "an unknown engine's busy counts": [(200, "busy", ("never joined",), PAUSE)],
    "an unknown engine's end does not": [(200, "engine_gone", ("never joined",), NONE)],
    "an engine that is lost busy is given time to come back": [
        (200, "busy", ("a",), PAUSE),
        (300, "engine_gone", ("a",), NONE),
        (349, "tick", (), NONE),
        (350, "tick", (), RESUME),
    ],
    "and is busy again without a second pause": [
        (200, "busy", ("a",), PAUSE),
        (300, "engine_gone", ("a",), NONE),
        (340, "engine_joined", ("a", True), NONE),
        (400, "tick", (), NONE),
        (500, "idle", ("a", 0), NONE),
        (510, "tick", (), RESUME),
    ],
    "an idle engine that leaves does not disturb offline": [
        (200, "engine_joined", ("a", False), NONE),
        (300, "engine_gone", ("a",), NONE),
    ],
    "an engine that joins busy": [(200, "engine_joined", ("a", True), PAUSE)],
    "an engine that joins again, now idle": [
        (200, "engine_joined", ("a", True), PAUSE),
        (300, "engine_joined", ("a", False), NONE),
        (310, "tick", (), RESUME),
    ],
    "a missed period pauses a running offline for a cooldown": [
        (200, "missed_busy", ("a",), PAUSE),
        (209, "tick", (), NONE),
        (210, "tick", (), RESUME),
    ],
    "a missed period restarts the cooldown": [
        (200, "busy", ("a",), PAUSE),
        (210, "idle", ("a", 0), NONE),
        (219, "missed_busy", ("a",), NONE),
        (228, "tick", (), NONE),
        (229, "tick", (), RESUME),
    ],
    "a missed period of a busy engine leaves it busy": [
        (200, "busy", ("a",), PAUSE),
        (210, "missed_busy", ("a",), NONE),
        (900, "tick", (), NONE),
    ],
    "a hold pauses, its release resumes at once": [
        (200, "hold", ("reclaim 1",), PAUSE),
        (201, "hold", ("reclaim 1",), NONE),
        (900, "tick", (), NONE),
        (910, "release", ("reclaim 1",), RESUME),
    ],
    "two holds, and one busy": [
        (200, "hold", (1,), PAUSE),
        (210, "hold", (2,), NONE),
        (220, "busy", ("a",), NONE),
        (230, "release", (1,), NONE),
        (240, "idle", ("a", 0), NONE),
        (260, "tick", (), NONE),
        (270, "release", (2,), RESUME),
    ],
    "a release within the cooldown waits for it": [
        (200, "busy", ("a",), PAUSE),
        (210, "hold", (1,), NONE),
        (220, "idle", ("a", 0), NONE),
        (225, "release", (1,), NONE),
        (230, "tick", (), RESUME),
    ],
    "an unknown release is ignored": [(200, "release", ("never held",), NONE)],
    "a long gap is bounded by the maximum": [
        (200, "busy", ("a",), PAUSE),
        (300, "idle", ("a", 10**30), NONE),
        (1299, "tick", (), NONE),
        (1300, "tick", (), RESUME),
    ],
    "a nonsensical gap is none": [
        (200, "busy", ("a",), PAUSE),
        (300, "idle", ("a", -5), NONE),
        (310, "tick", (), RESUME),
    ],
    "the longest gap of any engine counts, not the last": [
        (200, "busy", ("a",), PAUSE),
        (201, "busy", ("b",), NONE),
        (210, "idle", ("a", 100), NONE),
        (220, "idle", ("b", 6), NONE),
        (419, "tick", (), NONE),
        (420, "tick", (), RESUME),
    ],
    "time that runs backwards is time that stands still": [
        (200, "busy", ("a",), PAUSE),
        (150, "idle", ("a", 0), NONE),
        (209, "tick", (), NONE),
        (210, "tick", (), RESUME),
    ],
}


@pytest.mark.parametrize("steps", STORIES.values(), ids=STORIES.keys())
def test_story(steps: list[tuple[int, str, tuple[Hashable, ...], Action]]) -> None:
    gate = running_gate()
    for now, method, arguments, expected in steps:
        assert getattr(gate, method)(*arguments, now) is expected, f"{method}{arguments} at {now}"


def test_after_a_restart_offline_stays_paused_for_the_grace() -> None:
    gate = GatePolicy(2.0, MIN, MAX, GRACE, now_ns=1000)
    assert gate.paused
    assert gate.reason == "recovering"
    assert gate.tick(1049) is NONE
    assert gate.deadline_ns() == 1050
    assert gate.tick(1050) is RESUME
    assert gate.deadline_ns() is None


def test_an_engine_that_reconnects_busy_within_the_grace_is_never_disturbed() -> None:
    gate = GatePolicy(2.0, MIN, MAX, GRACE, now_ns=1000)
    assert gate.engine_joined("a", True, 1040) is NONE
    assert gate.deadline_ns() is None
    assert gate.tick(5000) is NONE
    assert gate.preemptions == 0


def test_an_offline_that_may_be_running_at_the_start_is_paused_by_the_first_call() -> None:
    gate = GatePolicy(2.0, MIN, MAX, GRACE, now_ns=1000, offline_paused=False)
    assert gate.deadline_ns() == 1000
    assert gate.tick(1000) is PAUSE
    assert gate.tick(1050) is RESUME


def test_the_gap_is_forgotten_after_the_window() -> None:
    gate = running_gate()
    gate.busy("a", 200)
    gate.idle("a", 100, 300)
    assert gate.cooldown_ns == 200
    gate.busy("a", 400)
    gate.idle("a", 0, 300 + GAP_WINDOW_NS)
    assert gate.cooldown_ns == 200
    gate.busy("a", 301 + GAP_WINDOW_NS)
    gate.idle("a", 0, 301 + GAP_WINDOW_NS)
    assert gate.cooldown_ns == MIN


def test_a_later_shorter_cooldown_does_not_cut_a_longer_one_that_runs() -> None:
    gate = running_gate()
    gate.busy("a", 200)
    gate.idle("a", 400, 300)  # until 1100
    far = 300 + GAP_WINDOW_NS + 1
    assert gate.tick(1100) is RESUME
    gate.busy("a", far - 500)
    gate.idle("a", 0, far - 400)  # the gap of 400 is still in the window: until far + 400
    gate.busy("a", far)
    gate.idle("a", 0, far)  # and now forgotten: alone it would be far + 10
    assert gate.deadline_ns() == far + 400


def test_counters() -> None:
    gate = running_gate()
    gate.busy("a", 200)
    gate.busy("b", 201)
    gate.missed_busy("a", 202)
    gate.idle("a", 0, 210)
    gate.idle("b", 0, 211)
    assert gate.reason == "cooldown"
    gate.tick(221)
    gate.hold(1, 300)
    assert gate.reason == "hold"
    assert (gate.preemptions, gate.busy_periods) == (2, 3)
    assert gate.busy_engines == frozenset()
    assert gate.holds == {1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param((-1.0, 0, 1, 0, 0), "cooldown_factor", id="negative factor"),
        pytest.param((float("nan"), 0, 1, 0, 0), "cooldown_factor", id="factor that is no number"),
        pytest.param((2.0, 5, 4, 0, 0), "minimum <= maximum", id="bounds crossed"),
        pytest.param((2.0, -1, 4, 0, 0), "0 <= minimum", id="negative bound"),
        pytest.param((2.0, 0, 4, -1, 0), "recovery_grace_ns", id="negative grace"),
    ],
)
def test_refused_settings(arguments: tuple[float, int, int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GatePolicy(*arguments)


@pytest.mark.parametrize("reports", [50, 2000])
def test_the_sliding_maximum_is_never_too_small_and_stays_small(reports: int) -> None:
    gaps = _Gaps()
    seen = []
    for number in range(reports):
        gap = 10_000 - number  # descending: the worst case for memory
        gaps.add(number, gap)
        seen.append(gap)
        assert gaps.longest_ns(number) == max(seen)
    assert len(gaps._kept) <= 256
    late = GAP_WINDOW_NS + reports - 10
    assert gaps.longest_ns(late) >= max(seen[-10:])


ENGINES = st.sampled_from(["a", "b", "c"])
TOKENS = st.sampled_from([1, 2])


class Interleavings(RuleBasedStateMachine):
    """Requests come, end, are aborted, engines die, reports repeat and get lost; time moves.

    The model knows the truth (which requests run, who holds) and follows the answers.
    """

    @initialize(
        factor=st.sampled_from([0.0, 0.5, 2.0]),
        minimum=st.integers(0, 20),
        extra=st.integers(0, 100),
        grace=st.integers(0, 50),
        paused=st.booleans(),
    )
    def start(self, factor: float, minimum: int, extra: int, grace: int, paused: bool) -> None:
        self.now = 0
        self.factor, self.minimum, self.maximum, self.grace = factor, minimum, minimum + extra, grace
        self.gate = GatePolicy(factor, minimum, minimum + extra, grace, 0, offline_paused=paused)
        self.runs = not paused
        self.requests: dict[str, list[int]] = {}  # engine -> PAUSEs seen by each of its requests
        self.held: set[int] = set()
        self.gaps: list[int] = []  # the window is far longer than a test's times
        self.cool_until = 0
        self.recovered = grace
        self.pauses = 0
        self.unasked = not paused and grace > 0  # the first call has yet to pause

    def answer(self, action: Action) -> None:
        """Follow the answer and check it against the truth."""
        self.unasked = False
        if action is PAUSE:
            assert self.runs, "PAUSE while paused"
            self.runs = False
            self.pauses += 1
            for requests in self.requests.values():
                for number in range(len(requests)):
                    requests[number] += 1
        elif action is RESUME:
            assert not self.runs, "RESUME while running"
            self.runs = True
        allowed = (
            not any(self.requests.values())
            and not self.held
            and self.now >= self.cool_until
            and self.now >= self.recovered
        )
        assert self.runs == allowed
        assert all(pauses <= 1 for requests in self.requests.values() for pauses in requests)

    def cool(self) -> None:
        longest = max(self.gaps, default=0)
        length = min(self.maximum, max(self.minimum, round(self.factor * longest)))
        self.cool_until = max(self.cool_until, self.now + length)

    @rule(by=st.integers(0, 120))
    def time_passes(self, by: int) -> None:
        self.now += by
        self.answer(self.gate.tick(self.now))

    @rule(engine=ENGINES, by=st.integers(0, 30))
    def request_arrives(self, engine: str, by: int) -> None:
        self.now += by
        self.requests.setdefault(engine, []).append(0)
        self.answer(self.gate.busy(engine, self.now))
        assert not self.runs, "P1: the event that turns an engine busy pauses"

    @precondition(lambda self: any(self.requests.values()))
    @rule(data=st.data(), gap=st.integers(-5, 80), by=st.integers(0, 30))
    def request_ends_or_is_aborted(self, data: st.DataObject, gap: int, by: int) -> None:
        self.now += by
        engine = data.draw(st.sampled_from(sorted(e for e, requests in self.requests.items() if requests)))
        self.requests[engine].pop(data.draw(st.integers(0, len(self.requests[engine]) - 1)))
        if not self.requests[engine]:
            self.gaps.append(gap)
            self.cool()
            self.answer(self.gate.idle(engine, gap, self.now))

    @rule(engine=ENGINES, gap=st.integers(0, 80))
    def a_report_repeats(self, engine: str, gap: int) -> None:
        if self.requests.get(engine):
            self.answer(self.gate.busy(engine, self.now))
        else:
            self.answer(self.gate.idle(engine, gap, self.now))

    @rule(engine=ENGINES, by=st.integers(0, 30))
    def a_period_is_missed(self, engine: str, by: int) -> None:
        self.now += by
        self.cool()
        self.answer(self.gate.missed_busy(engine, self.now))

    @rule(engine=ENGINES, by=st.integers(0, 30))
    def an_engine_dies(self, engine: str, by: int) -> None:
        self.now += by
        if self.requests.pop(engine, None):
            self.cool()
            self.recovered = max(self.recovered, self.now + self.grace)
        self.answer(self.gate.engine_gone(engine, self.now))

    @rule(engine=ENGINES, busy=st.booleans())
    def an_engine_joins_again(self, engine: str, busy: bool) -> None:
        if busy and not self.requests.get(engine):
            self.requests[engine] = [0]
        elif not busy and self.requests.pop(engine, None):
            self.cool()
        self.answer(self.gate.engine_joined(engine, busy, self.now))

    @rule(token=TOKENS)
    def hold(self, token: int) -> None:
        self.held.add(token)
        self.answer(self.gate.hold(token, self.now))

    @rule(token=TOKENS)
    def release(self, token: int) -> None:
        self.held.discard(token)
        self.answer(self.gate.release(token, self.now))

    @rule()
    def waiting_for_the_deadline_misses_nothing(self) -> None:
        """Just before the deadline a tick does nothing; without a deadline it never does."""
        deadline = self.gate.deadline_ns()
        waits_for_time = not self.runs and not self.held and not any(self.requests.values())
        assert (deadline is not None) == (waits_for_time or self.unasked)
        if deadline is None:
            self.now += 10_000
        elif deadline > self.now:
            self.now = deadline - 1
        else:
            return
        assert self.gate.tick(self.now) is NONE
        self.answer(NONE)

    @rule()
    def when_all_is_quiet_the_deadline_resumes(self) -> None:
        for engine, requests in self.requests.items():
            if requests:
                requests.clear()
                self.cool()
                self.recovered = max(self.recovered, self.now + self.grace)
                self.answer(self.gate.engine_gone(engine, self.now))
        for token in sorted(self.held):
            self.held.discard(token)
            self.answer(self.gate.release(token, self.now))
        self.answer(self.gate.tick(self.now))
        if not self.runs:
            deadline = self.gate.deadline_ns()
            assert deadline is not None
            assert deadline <= max(self.recovered, self.now + self.maximum)
            self.now = deadline
            self.answer(self.gate.tick(self.now))
        assert self.runs, "liveness"

    @invariant()
    def the_gate_agrees(self) -> None:
        if hasattr(self, "gate"):
            assert self.gate.busy_engines == {
                engine for engine, requests in self.requests.items() if requests
            }
            assert self.gate.holds == self.held
            assert self.minimum <= self.gate.cooldown_ns <= self.maximum
            assert self.gate.preemptions == self.pauses


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
