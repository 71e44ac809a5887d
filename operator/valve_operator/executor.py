# SPDX-License-Identifier: Apache-2.0
"""Does what reconcile asks for: a few requests at a time, each key alone, with back-off, only as the leader.

`want` replaces the whole list of wanted actions, so an action that is no longer needed is never done, however
long it waited. What an object looks like after a write goes back into the World at once (`seen`), so the next
reconcile does not ask again while the watch is still behind.

An action that is asked for again and again with the same content backs off like a failing one: whoever undoes
our writes (another controller, an older operator) is not fought in a hot loop.

All in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from valve_operator.actions import Action, Evict, WriteStatus, key_of
from valve_operator.errors import ApiError, BusyError, ConflictError, GoneError
from valve_operator.writes import Writes

log = logging.getLogger(__name__)

Key = tuple[str, str]

BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 300.0
FORGET_AFTER_S: Final = 900.0
"""An action not asked for so long begins without back-off."""
EVICTION_RETRY_S: Final = 10.0
"""Shortest wait after a disruption budget said no."""
STATUS_INTERVAL_S: Final = 10.0
"""Figures of a policy's status are written at most this often; conditions at once."""


@dataclass(slots=True)
class Attempts:
    """How often the same action was tried, and when it may be tried again."""

    action: Action
    count: int = 0
    not_before_s: float = 0.0
    last_s: float = 0.0


def backoff_s(count: int) -> float:
    """Wait after the count-th attempt in a row."""
    return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(count - 1, 20)))


class Executor:
    """`run` works until cancelled. concurrency: requests at a time. rate: writes a second, at most."""

    def __init__(
        self,
        writes: Writes,
        leads: Callable[[], bool],
        clock: Callable[[], float],
        concurrency: int = 16,
        rate: float = 200.0,
    ) -> None:
        self._writes = writes
        self._leads = leads
        self._clock = clock
        self._concurrency = concurrency
        self._interval_s = 1.0 / rate
        self._next_slot_s = 0.0
        self._wanted: dict[Key, Action] = {}
        self._busy: set[Key] = set()
        self._attempts: dict[Key, Attempts] = {}
        self._status_at_s: dict[str, float] = {}
        self._wake = asyncio.Event()
        self.done = 0
        self.failed = 0

    def want(self, actions: Sequence[Action]) -> None:
        """What is to be done from now on, in this order; replaces what was wanted before."""
        self._wanted = {key_of(action): action for action in actions}
        now_s = self._clock()
        for key in [k for k, a in self._attempts.items() if now_s - a.last_s > FORGET_AFTER_S]:
            if key not in self._wanted:
                del self._attempts[key]
        self._wake.set()

    @property
    def idle(self) -> bool:
        """Nothing is wanted and nothing is on its way."""
        return not self._wanted and not self._busy

    async def run(self) -> None:
        """The workers."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            key, wait_s = self._pick()
            if key is None:
                await self._rest(wait_s)
                continue
            action = self._wanted[key]
            self._busy.add(key)
            try:
                await self._slot()
                if self._wanted.get(key) == action:  # else it is no longer needed
                    await self._do(key, action)
            finally:
                self._busy.discard(key)

    def _pick(self) -> tuple[Key | None, float | None]:
        """The first action that may be done now; else how long until one may be (None: nothing is wanted)."""
        if not self._leads():
            return None, 1.0 if self._wanted else None
        now_s = self._clock()
        soonest: float | None = None
        for key, action in self._wanted.items():
            if key in self._busy:
                continue
            wait_s = self._not_before(key, action) - now_s
            if wait_s <= 0:
                return key, None
            soonest = wait_s if soonest is None else min(soonest, wait_s)
        return None, soonest

    def _not_before(self, key: Key, action: Action) -> float:
        known = self._attempts.get(key)
        not_before_s = known.not_before_s if known and known.action == action else 0.0
        if isinstance(action, WriteStatus) and not action.urgent:
            not_before_s = max(not_before_s, self._status_at_s.get(action.name, 0.0) + STATUS_INTERVAL_S)
        return not_before_s

    async def _rest(self, wait_s: float | None) -> None:
        """Until something new is wanted, or the time has passed."""
        self._wake.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _slot(self) -> None:
        """Spaces the writes out."""
        now_s = self._clock()
        self._next_slot_s = max(self._next_slot_s, now_s) + self._interval_s
        await asyncio.sleep(self._next_slot_s - self._interval_s - now_s)

    async def _do(self, key: Key, action: Action) -> None:
        if not self._leads():
            return
        tries = self._attempts.get(key)
        if tries is None or tries.action != action:
            tries = self._attempts[key] = Attempts(action)
        tries.count += 1
        tries.last_s = self._clock()
        wait_s = backoff_s(tries.count)
        try:
            await self._writes.do(action)
        except GoneError as error:
            if isinstance(action, Evict):
                log.info("%s: already gone", error.request)
            else:
                log.warning("%s; again in %.0fs unless it turns out to be unneeded", error, wait_s)
        except BusyError as error:
            wait_s = max(wait_s, error.retry_after_s or 0.0)
            if isinstance(action, Evict):
                wait_s = max(wait_s, EVICTION_RETRY_S)
            log.info("%s; again in %.0fs", error, wait_s)
            self.failed += 1
        except (ConflictError, ApiError) as error:
            log.warning("%s; again in %.1fs", error, wait_s)
            self.failed += 1
        else:
            self.done += 1
            if isinstance(action, WriteStatus):
                self._status_at_s[action.name] = self._clock()
            if self._wanted.get(key) == action:
                del self._wanted[key]
        tries.not_before_s = self._clock() + wait_s
