# SPDX-License-Identifier: Apache-2.0
"""The plugin's one shared object: GPUs, what they lend, and the ledger, behind one lock.

Why it exists: gRPC's threads allocate and list, one thread brings the agent's news, one the kubelet's; each
sees the result of the others whole. Every change of the ledger is on disk before anybody hears of it; where
the disk refuses, the change stands all the same (a failing Allocate makes a storm of failed pods) and the
log and a metric say so.

Threading model: every method takes the lock; none waits for anything but the disk. `wait` waits for a change.
Callers: plugin.py, watchers.py, publish.py, metrics.py, main.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from valve_api.container import Listing
from valve_api.names import RESOURCE_OFFLINE_MEMORY, RESOURCE_ONLINE_GPU, RESOURCES
from valve_deviceplugin.allocator import document, units
from valve_deviceplugin.allocator.ledger import Entry, Ledger
from valve_deviceplugin.allocator.lending import Lending, Report
from valve_deviceplugin.allocator.placement import Gpu
from valve_deviceplugin.allocator.reconcile import Absences, Changes, reconcile
from valve_deviceplugin.errors import StoreError
from valve_deviceplugin.log import Log
from valve_deviceplugin.store import Store
from valve_deviceplugin.timing import Timing


@dataclass(frozen=True, slots=True)
class Device:
    """One id as the kubelet is told of it."""

    id: str
    healthy: bool
    numa_node: int | None


class Counts(Protocol):
    """What is counted (metrics.py)."""

    def allocated(self, resource: str, outcome: str) -> None: ...

    def store_failed(self) -> None: ...


class Node:
    def __init__(
        self, store: Store, log: Log, counts: Counts, library: str, timing: Timing,
        clock: Callable[[], float], wall: Callable[[], float],
    ) -> None:  # fmt: skip
        """clock: monotonic seconds; wall: Unix seconds. Reads the ledger's file; one that cannot be used is
        moved aside, and the kubelet's list brings back what can be known. Raises StoreError if not even that
        works."""
        self._store, self._log, self._counts = store, log, counts
        self._library, self._timing, self._clock, self._wall = library, timing, clock, wall
        self._changed = threading.Condition()
        self._ledger, gpus = self._load()
        self._gpus = {gpu.id: gpu for gpu in gpus}
        self._shorts = {gpu.id: gpu.short for gpu in gpus}
        self._reported: set[str] | None = None
        self._lending: dict[str, Lending] = {}
        self._online: set[str] = set()
        self._absences = Absences(timing.gone_after, timing.release_after)
        self._lists: dict[str, list[Device]] = {resource: [] for resource in RESOURCES}
        self._versions = dict.fromkeys(RESOURCES, 0)
        with self._changed:
            self._refresh()

    def _load(self) -> tuple[Ledger, list[Gpu]]:
        try:
            found = self._store.load()
            return document.read(found) if found is not None else (Ledger(), [])
        except (StoreError, document.DocumentError) as error:
            aside = self._store.set_aside()
            self._log.emit("ledger-unreadable", level="error", why=str(error), moved_to=str(aside))
            return Ledger(), []

    def observe(self, reports: Sequence[Report]) -> None:
        """The agent's news. A GPU it reports no more lends nothing, and ends when nobody uses it."""
        with self._changed:
            now = self._clock()
            self._shorts = units.short_names((report.id for report in reports), self._shorts)
            self._reported = {report.id for report in reports}
            self._online = {report.id for report in reports if report.online_tenants}
            before = {gpu.id: gpu.units for gpu in self._gpus.values()}
            for report in reports:
                lending = self._lending.setdefault(report.id, Lending(self._timing.stand, self._timing.grace))
                lending.observe(report.lendable, now)
                self._gpus[report.id] = Gpu(
                    report.id, self._shorts[report.id], report.units, 0, False, report.numa_node
                )
            in_use = {gpu for entry in self._ledger for gpu in entry.gpus}
            for gone in self._gpus.keys() - self._reported - in_use:
                del self._gpus[gone]
                self._lending.pop(gone, None)
            if {gpu.id: gpu.units for gpu in self._gpus.values()} != before:
                self._log.emit("gpus", gpus={gpu.id: gpu.units for gpu in self._gpus.values()})
                self._save()
            self._refresh()

    def tick(self) -> None:
        """Time has passed without news: what is lent may have ended."""
        with self._changed:
            self._refresh()

    def devices(self, resource: str) -> tuple[int, list[Device]]:
        """(version, list). The list is never changed afterwards."""
        with self._changed:
            return self._versions[resource], self._lists[resource]

    def wait(self, resource: str, seen: int, timeout_s: float) -> None:
        """Return when the list is newer than version `seen`, somebody calls wake(), or after the timeout."""
        with self._changed:
            if self._versions[resource] == seen:
                self._changed.wait(timeout_s)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def prefer(
        self, resource: str, available: Collection[str], must: Collection[str], size: int
    ) -> list[str]:
        with self._changed:
            gpus = self._seen()
            if resource == RESOURCE_ONLINE_GPU:
                used = self._ledger.used(RESOURCE_OFFLINE_MEMORY)
                return units.prefer_seats(used, available, must, size, gpus)
            return units.prefer_units(self._ledger, resource, available, must, size, gpus)

    def allocate(self, resource: str, tokens: frozenset[str]) -> Entry | None:
        """The entry of a container that got these ids; it is on disk. None: they were never ours."""
        with self._changed:
            gpus = self._seen()
            if not units.named_gpus(tokens, gpus):
                return None
            make = units.allocate_seats if resource == RESOURCE_ONLINE_GPU else units.allocate_units
            made = make(self._ledger, resource, tokens, gpus, now_s=self._wall(), library=self._library)
            entry = made.entry
            self._absences.allocated(entry.id)
            outcome = "short" if entry.shortage else "remapped" if made.remapped else "ok"
            self._counts.allocated(resource, "repeated" if made.repeated else outcome)
            self._log.emit(
                "allocate", level="warning" if entry.shortage else "info", resource=resource, entry=entry.id,
                gpus=entry.gpus, memory_gib=entry.units, shortage_gib=entry.shortage,
                repeated=made.repeated, remapped=made.remapped,
            )  # fmt: skip
            self._save()
            self._refresh()
            return entry

    def reconcile(self, listing: Listing, may_release: bool) -> Changes:
        """The kubelet's news."""
        with self._changed:
            changes = reconcile(
                self._ledger, listing, self._absences, self._seen(), seats=RESOURCE_ONLINE_GPU,
                now_s=self._clock(), at_s=self._wall(), may_release=may_release,
                library=self._library,
            )  # fmt: skip
            for what in ("owned", "adopted", "released"):
                for entry in getattr(changes, what):
                    self._log.emit(
                        what, level="warning" if what == "adopted" else "info", resource=entry.resource,
                        entry=entry.id, owner=entry.owner and str(entry.owner), gpus=entry.gpus,
                        memory_gib=entry.units,
                    )  # fmt: skip
            if changes:
                self._save()
                self._refresh()
            return changes

    def unowned(self) -> bool:
        """Whether there is an entry whose container we do not know."""
        with self._changed:
            return any(entry.owner is None for entry in self._ledger)

    def libraries(self) -> set[str]:
        """Every library that a container may mount, the current one among them."""
        with self._changed:
            return {entry.library for entry in self._ledger if entry.library} | {self._library}

    def document(self) -> dict[str, Any]:
        with self._changed:
            return document.write(self._ledger, list(self._gpus.values()))

    def totals(self) -> tuple[list[Gpu], Mapping[str, int], int]:
        """(GPUs, GiB given away by GPU, GiB that entries are short), for metrics."""
        with self._changed:
            short = sum(entry.shortage for entry in self._ledger)
            return self._seen(), self._ledger.used(RESOURCE_OFFLINE_MEMORY), short

    def _seen(self) -> list[Gpu]:
        """The GPUs as they are now, by short name."""
        now = self._clock()
        seated = {
            gpu for entry in self._ledger if entry.resource == RESOURCE_ONLINE_GPU for gpu in entry.gpus
        }
        silent = Lending(0, 0)
        return sorted(
            (
                replace(
                    gpu,
                    lent=self._lending.get(gpu.id, silent).lent(now) if self._is_reported(gpu.id) else 0,
                    online=gpu.id in self._online or gpu.id in seated,
                )
                for gpu in self._gpus.values()
            ),
            key=lambda gpu: gpu.short,
        )

    def _is_reported(self, gpu: str) -> bool:
        return self._reported is not None and gpu in self._reported

    def _refresh(self) -> None:
        """Make the lists again; tell who waits if one is different."""
        gpus = self._seen()
        numa = {gpu.short: gpu.numa_node for gpu in gpus}
        health = units.healthy_units(self._ledger, RESOURCE_OFFLINE_MEMORY, gpus)
        lists = {
            # without an agent seats stay: online never waits for Valve
            RESOURCE_ONLINE_GPU: [
                Device(
                    units.seat_id(gpu.short),
                    self._reported is None or self._is_reported(gpu.id),
                    gpu.numa_node,
                )
                for gpu in gpus
            ],
            RESOURCE_OFFLINE_MEMORY: [
                Device(token, healthy, numa[token.rpartition("-")[0]]) for token, healthy in health.items()
            ],
        }
        for resource, devices in lists.items():
            if devices != self._lists[resource]:
                self._lists[resource] = devices
                self._versions[resource] += 1
                self._changed.notify_all()

    def _save(self) -> None:
        try:
            self._store.save(document.write(self._ledger, list(self._gpus.values())))
            self._log.changed("ledger-write", "")
        except StoreError as error:
            self._counts.store_failed()
            self._log.changed("ledger-write", str(error), level="error")
