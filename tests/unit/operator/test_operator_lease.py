# SPDX-License-Identifier: Apache-2.0
"""The Lease: the judgement as a table, and that no two replicas ever lead at once, whatever fails."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from valve_operator.api import Api, Kind
from valve_operator.errors import ApiError, ConflictError, GoneError
from valve_operator.lease import Leader, Seen, Step, Timing, judge


def lease(holder: str, version: str = "7", duration_s: int = 15) -> dict[str, Any]:
    return {
        "metadata": {"name": "l", "resourceVersion": version},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": duration_s},
    }


CASES: list[tuple[str, dict[str, Any] | None, Seen | None, Step]] = [
    ("there is none", None, None, Step.CREATE),
    ("it is mine", lease("me"), None, Step.RENEW),
    ("it was given up", lease(""), None, Step.TAKE),
    ("another's, seen for the first time", lease("other"), None, Step.WAIT),
    ("another's, changed since", lease("other"), Seen("6", 0), Step.WAIT),
    ("another's, unchanged for less than its duration", lease("other"), Seen("7", 86), Step.WAIT),
    ("another's, unchanged for its duration", lease("other"), Seen("7", 85), Step.WAIT),
    ("another's, unchanged for longer", lease("other"), Seen("7", 84), Step.TAKE),
    ("the duration is the holder's, not ours", lease("other", duration_s=60), Seen("7", 84), Step.WAIT),
]


@pytest.mark.parametrize(("case", "there", "seen", "step"), CASES, ids=[case[0] for case in CASES])
def test_judge(case: str, there: dict[str, Any] | None, seen: Seen | None, step: Step) -> None:
    assert judge(there, seen, "me", 100) is step


class Store(Api):
    """One Lease with optimistic locking, and failures as the dice say."""

    def __init__(self, dice: random.Random) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.dice = dice
        self.cut: set[str] = set()

    def _fail(self, who: str) -> None:
        if who in self.cut:
            raise ApiError("GET lease", 0, "no route")

    async def get(self, kind: Kind, name: str, namespace: str = "") -> dict[str, Any]:
        if self.lease is None:
            raise GoneError("GET lease", 404, "none")
        return self.lease

    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._fail(body["spec"]["holderIdentity"])
        if self.lease is not None:
            raise ConflictError("POST lease", 409, "there is one")
        return self._put(body)

    async def replace(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._fail(body["spec"]["holderIdentity"])
        assert self.lease is not None
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ConflictError("PUT lease", 409, "newer")
        done = self._put(body)
        if self.dice.random() < 0.1:
            raise ApiError("PUT lease", 0, "the answer was lost")
        return done

    def _put(self, body: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        meta = {**body["metadata"], "resourceVersion": str(self.version)}
        self.lease = {**body, "metadata": meta}
        return self.lease


@pytest.mark.parametrize("seed", range(20))
def test_two_never_lead_at_once(seed: int) -> None:
    """Replicas on one clock that jumps; answers get lost and networks are cut at random."""
    dice = random.Random(seed)
    store = Store(dice)
    now = [0.0]
    timing = Timing(duration_s=15, renew_deadline_s=10, retry_s=4)
    told: list[tuple[str, bool]] = []
    leaders = [
        Leader(store, "ns", "l", name, lambda: now[0], timing, lambda on, name=name: told.append((name, on)))  # type: ignore[misc]
        for name in "abc"
    ]

    async def play() -> None:
        led = 0
        for _ in range(400):
            now[0] += dice.choice([0.5, 1.0, 3.0, 8.0])
            store.cut = {leader.identity for leader in leaders if dice.random() < 0.2}
            await dice.choice(leaders)._try()
            leading = [leader.identity for leader in leaders if leader.leads()]
            assert len(leading) <= 1, leading
            led += len(leading)
        assert led > 100, "somebody leads most of the time"

    asyncio.run(play())


def test_who_gives_up_is_replaced_at_once() -> None:
    store = Store(random.Random(4))
    now = [0.0]
    told: list[str] = []

    def leader(name: str) -> Leader:
        return Leader(
            store, "ns", "l", name, lambda: now[0], Timing(), lambda on: told.append(f"{name} {on}")
        )

    async def play() -> None:
        first, second = leader("a"), leader("b")
        task = asyncio.create_task(first.run())
        while not first.leads():
            await asyncio.sleep(0)
        await second._try()
        assert not second.leads()
        task.cancel()
        await asyncio.wait({task})
        assert not first.leads()
        await second._try()
        assert second.leads()

    asyncio.run(play())
    assert told == ["a True", "a False"]
