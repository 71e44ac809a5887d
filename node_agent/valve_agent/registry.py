# SPDX-License-Identifier: Apache-2.0
"""Tenants and their processes: what the agent knows, and nothing that it could not learn again.

Why it exists: roles, limits, pages and arenas hang on processes, and processes come, reconnect and die in
any order. Everything here is rebuilt from the connections after a restart; nothing is on disk.

Also here is the slow scan: processes of offline tenants that never connected (a shell, a data loader, a
binary without libvalve) compute too, so they must be stopped like the others.

Threading model: the server thread only. Callers: agent.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from valve_agent.identity import children_of, shares_memory
from valve_agent.pidfds import has_ended
from valve_agent.pool import Holder
from valve_agent.shared import Ledger, Page
from valve_agent.wire import Role

SUBTREE_MAX = 4096
"""Processes looked at in one scan: a fork bomb must not stop the agent."""
SHARING_SCANS_MAX = 5
"""Scans for which a child that shares its parent's memory is left alone: it is an address-space helper about
to connect, or inside vfork before exec. After that it is treated like any other process."""


@dataclass(eq=False, slots=True)
class Tenant:
    id: int
    name: str
    role: Role
    limit_slabs: int
    """Most slabs its processes may hold together."""
    launcher_pid: int
    launcher_pidfd: int
    """Owned; closed when the launcher is gone."""
    launcher: int | None
    """The launcher's connection; None once it is lost."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """For metrics and status; a pod's: namespace, pod, container. Empty for a launcher's."""
    kept: bool = False
    """A pod's tenant stays while its container does, with or without processes."""


@dataclass(eq=False, slots=True)
class Memory:
    """A process's arena and what belongs to it."""

    arena: Any
    """What the device's MemoryPool made."""
    ledger_fd: int
    ledger: Ledger
    holder: Holder


@dataclass(eq=False, slots=True)
class Link:
    """What belongs to one connection of a process. Owns the page's descriptor and view."""

    connection: int
    page_fd: int
    page: Page
    helper_pidfd: int | None


@dataclass(eq=False, slots=True)
class Process:
    """An engine process that said HELLO. Owns its descriptors."""

    pid: int
    pidfd: int
    tenant: Tenant
    comm: str
    memory: Memory | None = None
    link: Link | None = None
    """None while the connection is lost and the process lives."""
    helper_pid: int | None = None
    helper_cpu_s: float | None = None
    """CPU time of the helper at the last look."""
    gpu_files: set[int] = field(default_factory=set)
    """numbers of the driver files whose channels the gate controls"""
    route: dict[str, Any] | None = None
    """How its GPU channels are controlled and why so, once it has some."""
    others: tuple[Any, ...] = ()
    """Agents of the other devices that an online process computes on."""
    lost_ns: int = 0
    """When the connection was lost."""


class Registry:
    def __init__(self) -> None:
        self.tenants: dict[int, Tenant] = {}
        self.launchers: dict[int, Tenant] = {}
        """Launcher's pid -> tenant; identity.py looks up ancestors here."""
        self.processes: dict[int, Process] = {}
        """Main pid -> process."""
        self.offline_roots: Callable[[], Iterable[int]] = tuple
        """Processes of offline tenants that have no launcher, from which the scan starts too (pods)."""
        self._next = 1

    def register(
        self, name: str, role: Role, limit_slabs: int, launcher_pid: int, launcher_pidfd: int, launcher: int
    ) -> tuple[Tenant, bool]:
        """A launcher announced itself, or came back over a new connection: (tenant, whether it is new). A new
        tenant gets its own copy of `launcher_pidfd`."""
        tenant = self.launchers.get(launcher_pid)
        new = tenant is None
        if any(other.name == name and other is not tenant for other in self.tenants.values()):
            name = f"{name}-{launcher_pid}"  # metrics and status tell tenants apart by name
        if tenant is None:
            pidfd = os.dup(launcher_pidfd)
            tenant = Tenant(self._next, name, role, limit_slabs, launcher_pid, pidfd, launcher)
            self._next += 1
            self.tenants[tenant.id] = tenant
            self.launchers[launcher_pid] = tenant
        tenant.name, tenant.limit_slabs, tenant.launcher = name, limit_slabs, launcher
        return tenant, new

    def register_pod(self, name: str, role: Role, limit_slabs: int, labels: Mapping[str, str]) -> Tenant:
        """A container of a pod: a tenant without a launcher, kept until `release`."""
        if any(other.name == name for other in self.tenants.values()):
            name = f"{name}-{self._next}"  # a pod of the same name is still ending
        tenant = Tenant(self._next, name, role, limit_slabs, 0, -1, None, dict(labels), kept=True)
        self._next += 1
        self.tenants[tenant.id] = tenant
        return tenant

    def release(self, tenant: Tenant) -> bool:
        """Its container is gone. True once the tenant is gone too, which its processes may delay."""
        tenant.kept = False
        self._drop_if_unused(tenant)
        return tenant.id not in self.tenants

    def launcher_gone(self, tenant: Tenant) -> None:
        """The launcher is dead: no new process can belong to this tenant."""
        del self.launchers[tenant.launcher_pid]
        os.close(tenant.launcher_pidfd)
        self._drop_if_unused(tenant)

    def process_gone(self, process: Process) -> None:
        if self.processes.get(process.pid) is process:
            del self.processes[process.pid]
        self._drop_if_unused(process.tenant)

    def _drop_if_unused(self, tenant: Tenant) -> None:
        used = any(process.tenant is tenant for process in self.processes.values())
        if not used and not tenant.kept and self.launchers.get(tenant.launcher_pid) is not tenant:
            self.tenants.pop(tenant.id, None)


class Scan:
    """Processes of offline tenants that are not connected: pid -> pidfd, kept from scan to scan."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}
        self._sharing: dict[int, int] = {}
        """pid -> scans in which it shared its parent's memory"""

    def update(self, registry: Registry) -> bool:
        """Look at the subtrees of all offline tenants; True if `found` changed."""
        left_out: set[int] = set()
        roots: list[int] = []
        for pid, process in registry.processes.items():
            if process.tenant.role == Role.OFFLINE:
                roots.append(pid)
                if process.helper_pid is not None:
                    left_out.add(process.helper_pid)
                left_out.add(pid)  # the gate keeps it, connected or not
        for pid, tenant in registry.launchers.items():
            left_out.add(pid)
            if tenant.role == Role.OFFLINE:
                roots.append(pid)
        of_pods = set(registry.offline_roots())
        # An orphan that was found before stays: its launcher may be dead, its work is not.
        live = self._subtrees([*roots, *of_pods, *self.found], left_out) | of_pods
        ended = {pid for pid, pidfd in self.found.items() if has_ended(pidfd)}
        live |= self.found.keys() - ended
        # A number of one that ended may be another's by now: that one is found by the next scan, so that the
        # gate hears of both.
        live -= left_out | ended
        before = set(self.found)
        for pid in before - live:
            os.close(self.found.pop(pid))
        for pid in live - before:
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                continue  # it is gone, or we are out of descriptors: the next scan looks again
            if has_ended(pidfd):  # a zombie computes nothing
                os.close(pidfd)
            else:
                self.found[pid] = pidfd
        return before != set(self.found)

    def _subtrees(self, roots: list[int], known: set[int]) -> set[int]:
        """Descendants of `roots`, without those that share their parent's memory for now. Those in `known`
        need no such doubt: a helper's children are looked at like anybody's."""
        seen: set[int] = set()
        sharing: dict[int, int] = {}
        pending = list(roots)
        while pending and len(seen) < SUBTREE_MAX:
            parent = pending.pop()
            for child in children_of(parent):
                if child in seen:
                    continue
                if child not in known and shares_memory(parent, child):
                    sharing[child] = self._sharing.get(child, 0) + 1
                    if sharing[child] <= SHARING_SCANS_MAX:
                        continue
                seen.add(child)
                pending.append(child)
        self._sharing = sharing
        return seen

    def close(self) -> None:
        for pidfd in self.found.values():
            os.close(pidfd)
        self.found.clear()
