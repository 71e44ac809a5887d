# SPDX-License-Identifier: Apache-2.0
"""The phases of the demo and the engines that they need.

exclusive, alone and naive share one pair of engines without Valve; the Valve phase starts
a fresh pair under an agent (`valve_phase.py`).  Every phase returns a `PhaseRecord` of raw
observations; `measure.py` makes figures of it.  Single asyncio loop; called by `main.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from valve_cli.demo.engines import MODEL_NAME, OfflineEngine, OnlineEngine
from valve_cli.demo.errors import MeasurementError
from valve_cli.demo.loadgen import LoadGenerator, Request
from valve_cli.demo.progress import Progress
from valve_cli.demo.prompts import Prompts
from valve_cli.demo.settings import Settings
from valve_cli.demo.stats import Span
from valve_cli.demo.trace import Arrival

T = TypeVar("T")
OFFLINE_PROMPT_OFFSET = 10_000
"""Offline prompts are numbered from here on, so that no prompt is in both engines."""
FILL_TIMEOUT_S = 240.0
TAIL_S = 3.0
"""Guess for the display: the last answers come about this long after the last arrival."""


@dataclass
class PhaseRecord:
    """What was seen in one phase."""

    name: str
    window: Span
    requests: list[Request] = field(default_factory=list)
    offline_samples: list[tuple[int, int]] = field(default_factory=list)
    offline_finished: list[dict[str, Any]] = field(default_factory=list)
    offline_issued: dict[str, int] = field(default_factory=dict)
    offline_aborted: set[str] = field(default_factory=set)
    offline_sequences: int = 0


@dataclass
class Pair:
    """A running online and a running offline engine."""

    online: OnlineEngine
    offline: OfflineEngine
    prompts: Prompts

    async def stop(self) -> None:
        await asyncio.gather(self.online.stop(), self.offline.stop())


async def start_pair(
    settings: Settings,
    env: dict[str, str],
    tag: str,
    online_bytes: int,
    wrap: Callable[[str], Sequence[str]] = lambda role: (),
    offline_env: dict[str, str] | None = None,
) -> Pair:
    """Start both engines side by side; both are up when this returns.  On failure none is left."""
    online = await OnlineEngine.start(settings, env, online_bytes, wrap("online"), tag)
    try:
        offline = await OfflineEngine.start(
            settings, env | (offline_env or {}), settings.device_bytes, wrap("offline"), tag
        )
    except BaseException:
        await online.stop()
        raise
    try:
        prompts = await all_or_none(online.ready(), offline.ready())
        load = settings.offline
        await offline.load(
            [
                (prompts.make(OFFLINE_PROMPT_OFFSET + n, tokens), output)
                for n, (tokens, output) in enumerate(load.lengths())
            ]
        )
        return Pair(online, offline, prompts)
    except BaseException:
        await asyncio.gather(online.stop(), offline.stop())
        raise


async def all_or_none(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, T]) -> T:
    """Runs both; the second's result, or the first failure of either with the other cancelled."""
    one, two = asyncio.create_task(first), asyncio.create_task(second)
    try:
        await asyncio.wait([one, two], return_when=asyncio.FIRST_EXCEPTION)
        for task in (one, two):
            if task.done():
                task.result()
        return two.result()
    finally:
        for task in (one, two):
            task.cancel()
        await asyncio.gather(one, two, return_exceptions=True)


class Phases:
    """Runs the phases on a pair of engines and keeps the display's record up to date."""

    def __init__(self, settings: Settings, arrivals: Sequence[Arrival], progress: Progress) -> None:
        self._settings = settings
        self._arrivals = arrivals
        self._progress = progress

    @property
    def replay_s(self) -> float:
        return self._arrivals[-1].at_s + TAIL_S

    async def exclusive(self, pair: Pair) -> PhaseRecord:
        """Offline alone: its rate, and the reference output of every prompt."""
        load = self._settings.offline
        self._progress.begin("exclusive", "offline fills the device's memory", load.exclusive_s + 25)
        offline = pair.offline
        await self.fill(offline, load.sequences, "exclusive")
        self._progress.detail = "offline alone: rate and reference outputs"
        begin = time.monotonic_ns()
        wanted = set(range(load.prompts))

        def complete() -> bool:
            have = {event["prompt"] for event in offline.finished}
            return time.monotonic_ns() - begin > load.exclusive_s * 1e9 and wanted <= have

        await self._watch(offline, complete, FILL_TIMEOUT_S * 2, "give every prompt its reference")
        end = time.monotonic_ns()
        await offline.abort()
        return self.offline_record("exclusive", offline, (begin, end), load.sequences)

    async def alone(self, pair: Pair) -> PhaseRecord:
        """Online alone; the idle offline engine is stopped so that it takes nothing."""
        self._progress.begin("alone", "online alone", self.replay_s, online=True)
        pair.offline.suspend()
        try:
            requests, window = await self.replay(pair)
        finally:
            pair.offline.resume()
        return PhaseRecord("alone", window, requests)

    async def naive(self, pair: Pair) -> PhaseRecord:
        """Both engines without Valve, the memory split statically."""
        sequences = self._settings.naive_sequences
        self._progress.begin("naive", "offline fills its part of the memory", self.replay_s + 20, online=True)
        await self.fill(pair.offline, sequences, "naive")
        self._progress.detail = "both engines, no Valve"
        requests, window = await self.replay(pair, pair.offline)
        await pair.offline.abort()
        record = self.offline_record("naive", pair.offline, window, sequences)
        record.requests = requests
        return record

    def offline_record(self, name: str, offline: OfflineEngine, window: Span, sequences: int) -> PhaseRecord:
        """The part of the driver's report that belongs to this phase (ids begin with its name)."""
        mine = f"{name}-"
        return PhaseRecord(
            name,
            window,
            offline_samples=list(offline.samples),
            offline_finished=[e for e in offline.finished if e["id"].startswith(mine)],
            offline_issued={rid: p for rid, p in offline.issued.items() if rid.startswith(mine)},
            offline_aborted={rid for rid in offline.aborted if rid.startswith(mine)},
            offline_sequences=sequences,
        )

    async def fill(
        self, offline: OfflineEngine, sequences: int, phase: str, observe: Callable[[], None] = lambda: None
    ) -> None:
        """Feed the offline engine until a quarter as many requests have ended as are kept in
        it: by then its memory is full and requests end and start evenly."""
        before = len(offline.finished)
        await offline.feed(sequences, phase)
        await self._watch(
            offline,
            lambda: len(offline.finished) - before >= sequences / 4,
            FILL_TIMEOUT_S,
            f"fill its memory for the phase {phase}",
            observe,
        )

    async def replay(
        self, pair: Pair, offline: OfflineEngine | None = None, observe: Callable[[], None] = lambda: None
    ) -> tuple[list[Request], Span]:
        """The trace against the online engine; the window is first arrival to last answer.
        `observe` is called four times a second and may raise to end the phase."""
        generator = LoadGenerator(pair.online.url, MODEL_NAME, self._arrivals, pair.prompts.make)
        task = asyncio.create_task(generator.run())
        try:
            while not task.done():
                await asyncio.wait([task], timeout=0.25)
                self._progress.requests = generator.requests
                pair.online.child.check()
                if offline:
                    self._observe(offline)
                observe()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        requests = task.result()
        return requests, (generator.begin_ns, max(r.end_ns for r in requests))

    async def warm_up(self, pair: Pair) -> None:
        """Unmeasured requests of several lengths: the first of each kind pays for lazy set-up."""
        generator = LoadGenerator(pair.online.url, MODEL_NAME, self._arrivals, pair.prompts.make)
        order = sorted(range(len(self._arrivals)), key=lambda n: self._arrivals[n].context_tokens)
        await generator.warm_up([order[0], order[len(order) // 2], order[-1]])

    async def _watch(
        self,
        offline: OfflineEngine,
        done: Callable[[], bool],
        timeout_s: float,
        what: str,
        observe: Callable[[], None] = lambda: None,
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            self._observe(offline)
            observe()
            if done():
                return
            if time.monotonic() > deadline:
                raise MeasurementError(
                    f"the offline engine did not {what} within {timeout_s:g} s;"
                    f" its log is {offline.child.log}: use a smaller model or --quick"
                )
            await asyncio.sleep(0.25)

    def _observe(self, offline: OfflineEngine) -> None:
        offline.poll()
        self._progress.offline_samples = offline.samples
        self._progress.offline_running = offline.running
        self._progress.offline_finished = len(offline.finished)
