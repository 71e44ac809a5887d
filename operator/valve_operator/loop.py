# SPDX-License-Identifier: Apache-2.0
"""When reconcile runs: shortly after the World changed, on the leader, with a complete World. And the
clockwork.

Changes are gathered for a moment (DEBOUNCE_S), so a thousand events make a few runs, not a thousand. A run
without a change happens every TICK_S, for what only time changes: starved pods, silent agents. Both are
computation alone; a run that finds nothing missing sends nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from valve_operator import daemonsets
from valve_operator.api import Api, Kind
from valve_operator.cache import Cache
from valve_operator.errors import ApiError, GoneError
from valve_operator.executor import Executor
from valve_operator.reconcile import reconcile

log = logging.getLogger(__name__)

DEBOUNCE_S: Final = 0.2
TICK_S: Final = 10.0
CENSUS_S: Final = 600.0
DAEMONSETS_S: Final = 60.0
RETRY_S: Final = 2.0


class Loop:
    """Owns the decision; `synced` once the World is complete."""

    def __init__(self, api: Api, cache: Cache, executor: Executor, leads: Callable[[], bool]) -> None:
        self._api = api
        self._cache = cache
        self._executor = executor
        self._leads = leads
        self.synced = asyncio.Event()
        self.runs = 0
        self.slowest_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._census())
            group.create_task(self._reconcile())

    def led(self, leads: bool) -> None:
        """This replica leads now, or does not any more: then nothing is wanted of it."""
        if not leads:
            self._executor.want([])
        self._cache.dirty.set()

    async def _reconcile(self) -> None:
        await self.synced.wait()
        dirty = self._cache.dirty
        while True:
            dirty.clear()
            if self._leads():
                self._once()
            else:
                self._executor.want([])
            try:
                async with asyncio.timeout(TICK_S):
                    await dirty.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(DEBOUNCE_S)

    def _once(self) -> None:
        begun_s = time.thread_time()  # not wall time: a busy machine would look like a slow decision
        actions = reconcile(self._cache.world, datetime.now(UTC), time.monotonic())
        self._executor.want(actions)
        self.runs += 1
        self.slowest_s = max(self.slowest_s, time.thread_time() - begun_s)

    async def _census(self) -> None:
        """The first one until it succeeds; then each in its interval."""
        next_census_s = 0.0
        while True:
            try:
                if time.monotonic() >= next_census_s:
                    await self._cache.census(self._api)
                    next_census_s = time.monotonic() + CENSUS_S
                    if not self.synced.is_set():
                        world = self._cache.world
                        log.info("knows %d nodes and %d policies", len(world.nodes), len(world.policies))
                        self.synced.set()
                elif self._leads():
                    await self._cache.refresh_daemonsets(self._api)
            except ApiError as error:
                log.warning("census: %s; again in %.0fs", error, RETRY_S)
                await asyncio.sleep(RETRY_S)
                continue
            await asyncio.sleep(DAEMONSETS_S)


async def templates(api: Api, folder: Path, namespace: str, owner: str) -> tuple[daemonsets.Json, ...]:
    """The DaemonSets to make. Raises TemplateError; waits for the ConfigMap that owns them."""
    read = daemonsets.read(folder)
    kind = Kind("ConfigMap", "v1", "configmaps", namespace)
    while True:
        try:
            uid = (await api.get(kind, owner))["metadata"]["uid"]
        except GoneError:
            log.warning("ConfigMap %s/%s (--owner) is not there; waiting for it", namespace, owner)
        except ApiError as error:
            log.warning("%s; again in %.0fs", error, RETRY_S)
        else:
            return tuple(daemonsets.manifest(template, namespace, owner, uid) for template in read)
        await asyncio.sleep(RETRY_S)
