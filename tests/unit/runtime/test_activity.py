# SPDX-License-Identifier: Apache-2.0
"""Busy from the first sign of a request until none is left, whatever the order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from valve_runtime.activity import Activity


class Recorder:
    def __init__(self) -> None:
        self.said: list[str] = []

    def busy(self) -> None:
        self.said.append("busy")

    def idle(self, decode_gap_ns: int) -> None:
        self.said.append("idle")


def test_a_request_between_two_stages_keeps_it_busy() -> None:
    link = Recorder()
    activity = Activity(link)  # type: ignore[arg-type]
    activity.enter("a")
    assert not activity.settle(lambda: 0), "the request is entering: in no queue yet, and not gone"
    activity.entered("a")
    assert not activity.settle(lambda: 1)
    assert activity.settle(lambda: 0)
    assert link.said == ["busy", "idle"]


def test_idle_is_said_once() -> None:
    link = Recorder()
    activity = Activity(link)  # type: ignore[arg-type]
    activity.enter("a")
    activity.entered("a")
    assert [activity.settle(lambda: 0) for _ in range(3)] == [True, False, False]
    assert link.said == ["busy", "idle"]


def test_a_dead_engine_is_idle() -> None:
    link = Recorder()
    activity = Activity(link)  # type: ignore[arg-type]
    activity.enter("a")
    activity.gone()
    assert link.said == ["busy", "idle"]
    activity.entered("a")
    assert not activity.settle(lambda: 0)
    assert link.said == ["busy", "idle"]


class Requests(RuleBasedStateMachine):
    """Requests enter, move on, end or fail in any order; the same id may come again."""

    def __init__(self) -> None:
        super().__init__()
        self.link = Recorder()
        self.activity = Activity(self.link)  # type: ignore[arg-type]
        self.entering: list[str] = []
        self.inside: list[str] = []

    @rule(name=st.sampled_from("abc"))
    def enter(self, name: str) -> None:
        self.activity.enter(name)
        self.entering.append(name)

    @rule(keep=st.booleans())
    def move_on(self, keep: bool) -> None:
        if self.entering:
            name = self.entering.pop(0)
            if keep:
                self.inside.append(name)
            self.activity.entered(name)
            self.activity.settle(lambda: len(self.inside))

    @rule()
    def finish(self) -> None:
        if self.inside:
            self.inside.pop()
        self.activity.settle(lambda: len(self.inside))

    @rule()
    def abort_unknown(self) -> None:
        self.activity.entered("never came")
        self.activity.settle(lambda: len(self.inside))

    @invariant()
    def busy_while_anything_is_there(self) -> None:
        last = self.link.said[-1] if self.link.said else "idle"
        if self.entering or self.inside:
            assert last == "busy"


class TestRequests(Requests.TestCase):
    settings = settings(max_examples=60, deadline=None)
