# SPDX-License-Identifier: Apache-2.0
"""How much GPU memory an offline tenant has in all, and who is over it.

Why it exists: a tenant's limit holds for its arena and for what its processes allocate by themselves.
libvalve refuses what would go over, by the limit in each process's page. Here that limit is kept up to date
when a tenant has several processes, what they allocated is taken off the slabs that the tenant may still be
granted, and NVML, which nobody in a pod can argue with, is the judge: a tenant that stays over its limit has
found a way around libvalve and is ended (P6).

Threading model: the server thread, once a second. Caller: agent.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from valve_agent.registry import Process, Registry, Tenant
from valve_agent.wire import Role

CONTEXT_BYTES = 1 << 30
"""What a process may have beside its allocations without being held to account: its context, modules and
libraries' workspaces. Some hundred MiB on the GPUs that others measured; not yet measured by us."""
LOOKS = 3
"""Looks in a row: NVML and the page are not read at the same instant."""


class Use(NamedTuple):
    """One process's memory, in bytes."""

    reported: int
    """by libvalve: what it allocated beside its arena"""
    seen: int
    """by NVML, everything of it; 0: NVML does not know it"""
    held: int
    """slabs that it was granted"""

    def direct(self, context_bytes: int) -> int:
        """What it allocated beside its arena: at least what it reports, and what NVML sees beyond what can
        be explained. Whether NVML counts granted slabs for the process is not known, so they are allowed."""
        return max(self.reported, self.seen - self.held - context_bytes)


def over_limit(uses: Iterable[Use], limit_bytes: int, slab_bytes: int, context_bytes: int) -> int:
    """Bytes by which a tenant is over its limit beyond rounding to a slab; 0: it is not."""
    total = sum(use.direct(context_bytes) + use.held for use in uses)
    return total - limit_bytes if total - limit_bytes > slab_bytes else 0


def is_around(uses: Iterable[Use], limit_bytes: int, slab_bytes: int, context_bytes: int) -> bool:
    """Whether a tenant that is over its limit got there past libvalve: by memory that nobody reported, or by
    allocating more than all. A slab that was granted while it allocated is the agent's own doing."""
    uses = list(uses)
    direct = sum(use.direct(context_bytes) for use in uses)
    return direct - sum(use.reported for use in uses) > slab_bytes or direct > limit_bytes


class GpuLimits:
    def __init__(
        self,
        registry: Registry,
        slab_bytes: int,
        seen: Callable[[], Mapping[int, int]],
        end: Callable[[Process, str], None],
        *,
        context_bytes: int = CONTEXT_BYTES,
    ) -> None:
        """`seen`: NVML's word: pid -> bytes. `end`: end a process and say why."""
        self._registry = registry
        self._slab_bytes = slab_bytes
        self._seen = seen
        self._end = end
        self._context_bytes = context_bytes
        self._seen_last: Mapping[int, int] = {}
        self._over: dict[int, int] = {}
        """tenant -> looks in a row that found it over its limit"""

    def first(self, tenant: Tenant) -> int:
        """The limit that a new process starts with: what the others left. Never 0, which means no limit."""
        uses = self._uses(tenant, {})
        return self._left(tenant, sum(use.direct(self._context_bytes) + use.held for use in uses.values()))

    def refresh(self) -> None:
        """Before slabs are granted: what was allocated since the last look counts."""
        for tenant in self._registry.tenants.values():
            if tenant.role == Role.OFFLINE:
                self._allot(tenant, self._uses(tenant, self._seen_last))

    def look(self) -> None:
        """Raises DeviceError when NVML does not answer; the pages are up to date all the same."""
        try:
            seen = self._seen_last = self._seen()
            judged = True
        except Exception:
            self._look({}, judged=False)
            raise
        self._look(seen, judged)

    def _look(self, seen: Mapping[int, int], judged: bool) -> None:
        tenants = [t for t in self._registry.tenants.values() if t.role == Role.OFFLINE]
        self._over = {t.id: self._over.get(t.id, 0) for t in tenants}
        for tenant in tenants:
            uses = self._uses(tenant, seen)
            self._allot(tenant, uses)
            limit = tenant.limit_slabs * self._slab_bytes
            over = over_limit(uses.values(), limit, self._slab_bytes, self._context_bytes)
            if not is_around(uses.values(), limit, self._slab_bytes, self._context_bytes):
                over = 0
            self._over[tenant.id] = self._over[tenant.id] + 1 if over and judged else 0
            if self._over[tenant.id] >= LOOKS:
                worst = max(uses, key=lambda p: uses[p].direct(self._context_bytes))
                self._end(
                    worst,
                    f"its tenant uses {(limit + over) >> 20} MiB of GPU memory where {limit >> 20} are "
                    "allowed: raise `valve run --memory`, or load libvalve before libcuda",
                )

    def _uses(self, tenant: Tenant, seen: Mapping[int, int]) -> dict[Process, Use]:
        return {
            process: Use(
                process.link.page.direct_bytes if process.link is not None else 0,
                seen.get(process.pid, 0),
                process.memory.holder.count * self._slab_bytes if process.memory is not None else 0,
            )
            for process in self._registry.processes.values()
            if process.tenant is tenant
        }

    def _allot(self, tenant: Tenant, uses: Mapping[Process, Use]) -> None:
        direct = {process: use.direct(self._context_bytes) for process, use in uses.items()}
        total = sum(direct.values()) + sum(use.held for use in uses.values())
        slabs = -(-sum(direct.values()) // self._slab_bytes)
        for process, use in uses.items():
            if process.link is not None:
                process.link.page.memory_limit_bytes = self._left(tenant, total - direct[process] - use.held)
            if process.memory is not None:
                process.memory.holder.limit = max(0, tenant.limit_slabs - slabs)

    def _left(self, tenant: Tenant, others_bytes: int) -> int:
        return max(1, tenant.limit_slabs * self._slab_bytes - others_bytes)
