# SPDX-License-Identifier: Apache-2.0
"""Keeps the World up to date: what the watch brings, what our writes answer, and a census now and then.

A watch can lose deletions (a stream that broke and was too old to resume), and a watch alone never says when
it has told everything. So a census lists the names of every object: before the first reconcile, to know when
the World is complete (a World in which half of the nodes are missing would read as "delete half of the
settings"), and every ten minutes after, to drop what is gone. An object that a census misses is looked up
before it is dropped: it may be younger than the list.

The watch lags behind our own writes: what is older than what we know (metadata.resourceVersion) is left out,
or a condition would change back and its event be told twice. After etcd was restored from a backup, restart
the operator, as every controller: versions begin anew there.

All in the event loop's thread. `dirty` is set whenever a view changes; an update that changes none wakes
nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from valve_operator import views
from valve_operator.api import COLONODES, NODES, PODS, POLICIES, Api, Kind
from valve_operator.world import ColonodeView, World

log = logging.getLogger(__name__)

Json = dict[str, Any]
WATCHED = (NODES, POLICIES, COLONODES, PODS)


class Cache:
    """The World and how it changes."""

    def __init__(self, world: World, daemonsets: Kind, clock: Callable[[], float]) -> None:
        self.world = world
        self.daemonsets = daemonsets
        self.dirty = asyncio.Event()
        self._clock = clock
        self._tables: dict[str, tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]] = {
            NODES.name: (world.nodes, views.node_view),
            POLICIES.name: (world.policies, views.policy_view),
            COLONODES.name: (world.colonodes, views.colonode_view),
            PODS.name: (world.pods, views.pod_view),
            daemonsets.name: (world.daemonsets, views.daemonset_view),
        }
        self._versions: dict[tuple[str, str], int] = {}
        self.events = 0

    def seen(self, kind: str, raw: Mapping[str, Any]) -> None:
        """The object exists and looks like this."""
        self.events += 1
        table, view_of = self._tables[kind]
        key = _key(kind, raw["metadata"])
        if self._outdated(kind, key, raw["metadata"]):
            return
        view = view_of(raw)
        if view is None:
            self.gone(kind, key)
            return
        if kind == COLONODES.name:
            self.world.paused.observe(key, raw.get("status") or {}, self._clock())
        before = table.get(key)
        if before != view:
            table[key] = view
            if not _only_figures(before, view):
                self.dirty.set()

    def told(self, kind: str, raw: Mapping[str, Any], deleted: bool) -> None:
        """What the watch tells."""
        key = _key(kind, raw["metadata"])
        if not deleted:
            self.seen(kind, raw)
        elif not self._outdated(kind, key, raw["metadata"]):
            self.gone(kind, key)

    def gone(self, kind: str, key: str) -> None:
        """The object does not exist any more. key: name, for pods namespace/name."""
        self._versions.pop((kind, key), None)
        if kind == COLONODES.name:
            self.world.paused.forget(key)
        if self._tables[kind][0].pop(key, None) is not None:
            self.dirty.set()

    def _outdated(self, kind: str, key: str, meta: Mapping[str, Any]) -> bool:
        """A newer state of the object is known; else this one becomes the newest."""
        version = int(meta.get("resourceVersion") or 0)
        if version < self._versions.get((kind, key), 0):
            return True
        self._versions[kind, key] = version
        return False

    async def census(self, api: Api) -> None:
        """Drops what is gone, and finds what the watch has not told. Raises ApiError."""
        for kind in WATCHED:
            table, _ = self._tables[kind.name]
            known = set(table)
            there = {_key(kind.name, item["metadata"]) async for item in api.metadata(kind)}
            for key in known - there:
                await self._look(api, kind, key)
            missing = sorted(there - set(table))
            if len(missing) > 100:  # the first census: one list is cheaper than a look at each
                async for item in api.objects(kind):
                    self.seen(kind.name, item)
            else:
                for key in missing:
                    await self._look(api, kind, key)
        await self.refresh_daemonsets(api)

    async def refresh_daemonsets(self, api: Api) -> None:
        """Reads our DaemonSets: two objects, so no watch. Raises ApiError."""
        found = {item["metadata"]["name"]: item async for item in api.objects(self.daemonsets)}
        for name in set(self.world.daemonsets) - set(found):
            self.gone(self.daemonsets.name, name)
        for item in found.values():
            self.seen(self.daemonsets.name, item)

    async def _look(self, api: Api, kind: Kind, key: str) -> None:
        namespace, _, name = key.rpartition("/")
        found = await api.find(kind, name, namespace)
        if found is None:
            self.gone(kind.name, key)
        else:
            self.seen(kind.name, found)


def _only_figures(before: Any, view: Any) -> bool:
    """A ColocationNode whose agent says the same with other numbers."""
    if not isinstance(before, ColonodeView) or not isinstance(view, ColonodeView):
        return False
    return replace(before, report=view.report) == view and before.report.says == view.report.says


def _key(kind: str, meta: Mapping[str, Any]) -> str:
    """Of pods namespace/name; the others live in one namespace or in none."""
    return f"{meta['namespace']}/{meta['name']}" if kind == PODS.name else str(meta["name"])
