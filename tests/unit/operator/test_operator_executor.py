# SPDX-License-Identifier: Apache-2.0
"""The executor: order, back-off, what is not done any more, and silence without the lead."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from valve_operator.actions import Action, EventNote, Evict, LabelNode, WriteStatus
from valve_operator.errors import ApiError, BusyError, ConflictError, GoneError
from valve_operator.executor import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    EVICTION_RETRY_S,
    STATUS_INTERVAL_S,
    Executor,
    backoff_s,
)
from valve_operator.writes import Writes


class Recorder(Writes):
    """Notes what is done and fails as told."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.error: Exception | None = None
        self.running = 0
        self.most = 0
        self.hold: asyncio.Event | None = None

    async def do(self, action: Action) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.hold is not None:
                await self.hold.wait()
            await asyncio.sleep(0)
            self.done.append(action.name)
            if self.error is not None:
                raise self.error
        finally:
            self.running -= 1


class Rig:
    """An executor on a clock of ours."""

    def __init__(self, **settings: float) -> None:
        self.now_s = 100.0
        self.leading = True
        self.writes = Recorder()
        self.asked = 0
        given = {"rate": 1e9, **settings}
        self.executor = Executor(self.writes, self.leads, lambda: self.now_s, **given)  # type: ignore[arg-type]

    def leads(self) -> bool:
        self.asked += 1
        return self.leading

    async def turn(self, times: int = 200) -> None:
        for _ in range(times):
            await asyncio.sleep(0)

    def play(self, story: Callable[[Rig], Awaitable[None]]) -> None:
        async def run() -> None:
            task = asyncio.create_task(self.executor.run())
            try:
                await story(self)
            finally:
                task.cancel()
                await asyncio.wait({task})

        asyncio.run(run())


def labels(*names: str) -> Sequence[Action]:
    return [LabelNode(name, "u", {}) for name in names]


EVICT = Evict("ns", "pod", "u", EventNote("Normal", "Starved", ""))


def test_everything_wanted_is_done_once() -> None:
    async def story(rig: Rig) -> None:
        rig.executor.want(labels("a", "b", "c"))
        await rig.turn()
        assert sorted(rig.writes.done) == ["a", "b", "c"]
        assert rig.executor.idle

    Rig().play(story)


def test_no_more_at_a_time_than_allowed() -> None:
    async def story(rig: Rig) -> None:
        rig.writes.hold = asyncio.Event()
        rig.executor.want(labels(*map(str, range(50))))
        await rig.turn()
        assert rig.writes.most == 4
        rig.writes.hold.set()
        await rig.turn(500)
        assert len(rig.writes.done) == 50

    Rig(concurrency=4).play(story)


def test_what_is_no_longer_wanted_is_not_done() -> None:
    async def story(rig: Rig) -> None:
        rig.writes.hold = asyncio.Event()
        rig.executor.want(labels("a", "b"))
        await rig.turn()
        rig.executor.want(labels("c"))
        rig.writes.hold.set()
        await rig.turn()
        assert rig.writes.done == ["a", "c"]

    Rig(concurrency=1).play(story)


def test_nothing_is_done_without_the_lead() -> None:
    async def story(rig: Rig) -> None:
        rig.leading = False
        rig.executor.want(labels("a"))
        await rig.turn()
        assert rig.writes.done == []
        assert rig.asked < 50, "it waits for the lead, it does not spin"

    Rig().play(story)


def test_what_waits_for_its_turn_is_dropped_when_it_is_no_longer_wanted() -> None:
    async def story(rig: Rig) -> None:
        rig.executor.want(labels("a", "b"))
        await rig.turn()
        rig.executor.want([])
        await asyncio.sleep(0.1)
        assert rig.writes.done == ["a"]

    Rig(rate=20).play(story)


FAILURES = [
    ("refused", ApiError("r", 403, "no"), BACKOFF_FIRST_S),
    ("another writer", ConflictError("r", 409, "newer"), BACKOFF_FIRST_S),
    ("gone", GoneError("r", 404, "none"), BACKOFF_FIRST_S),
    ("busy", BusyError("r", 503, "later"), BACKOFF_FIRST_S),
    ("busy, and it says until when", BusyError("r", 429, "later", 7), 7.0),
]


@pytest.mark.parametrize(("case", "error", "wait_s"), FAILURES, ids=[case[0] for case in FAILURES])
def test_a_failure_is_tried_again_after_its_time(case: str, error: Exception, wait_s: float) -> None:
    async def story(rig: Rig) -> None:
        rig.writes.error = error
        rig.executor.want(labels("a"))
        await rig.turn()
        rig.now_s += wait_s - 0.01
        rig.executor.want(labels("a"))
        await rig.turn()
        assert rig.writes.done == ["a"]
        rig.now_s += 0.02
        rig.executor.want(labels("a"))
        await rig.turn()
        assert rig.writes.done == ["a", "a"]

    Rig().play(story)


def test_a_budget_that_says_no_is_asked_again_later() -> None:
    async def story(rig: Rig) -> None:
        rig.writes.error = BusyError("POST eviction", 429, "budget")
        rig.executor.want([EVICT])
        await rig.turn()
        rig.now_s += EVICTION_RETRY_S - 0.1
        rig.executor.want([EVICT])
        await rig.turn()
        assert rig.writes.done == ["pod"]
        rig.now_s += 0.2
        rig.executor.want([EVICT])
        await rig.turn()
        assert rig.writes.done == ["pod", "pod"]

    Rig().play(story)


def test_whoever_undoes_our_writes_is_not_fought_in_a_hot_loop() -> None:
    """The write succeeds, and reconcile asks for the very same again, for somebody undid it."""

    async def story(rig: Rig) -> None:
        for _ in range(600):  # a minute in steps of 0.1 s
            rig.executor.want(labels("a"))
            await rig.turn(20)
            rig.now_s += 0.1
        assert len(rig.writes.done) <= 8, "0.5 + 1 + 2 + 4 + ... seconds apart"

    Rig().play(story)


def test_a_new_content_does_not_wait() -> None:
    async def story(rig: Rig) -> None:
        rig.writes.error = ApiError("r", 500, "broken")
        rig.executor.want([LabelNode("a", "u", {})])
        await rig.turn()
        rig.executor.want([LabelNode("a", "u", {"x": "y"})])
        await rig.turn()
        assert rig.writes.done == ["a", "a"]

    Rig().play(story)


def test_figures_wait_for_their_turn_and_conditions_do_not() -> None:
    async def story(rig: Rig) -> None:
        rig.executor.want([WriteStatus("p", "u", {"gpus": 1}, urgent=False)])
        await rig.turn()
        rig.now_s += STATUS_INTERVAL_S - 1
        rig.executor.want([WriteStatus("p", "u", {"gpus": 2}, urgent=False)])
        await rig.turn()
        assert rig.writes.done == ["p"]
        rig.executor.want([WriteStatus("p", "u", {"gpus": 3}, urgent=True)])
        await rig.turn()
        assert rig.writes.done == ["p", "p"]

    Rig().play(story)


def test_backoff_doubles_up_to_its_limit() -> None:
    waits = [backoff_s(count) for count in range(1, 40)]
    assert waits[:3] == [BACKOFF_FIRST_S, 2 * BACKOFF_FIRST_S, 4 * BACKOFF_FIRST_S]
    assert max(waits) == waits[-1] == BACKOFF_MAX_S
