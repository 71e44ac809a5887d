# SPDX-License-Identifier: Apache-2.0
"""Tenants come, come back and go; the scan finds their processes that never connected."""

from __future__ import annotations

import errno
import os

import pytest

from valve_agent import registry as registry_module
from valve_agent.registry import SHARING_SCANS_MAX, Process, Registry, Scan
from valve_agent.wire import Role

ME = os.getpid()


@pytest.fixture
def registry() -> Registry:
    return Registry()


def pidfd() -> int:
    return os.pidfd_open(ME)


def register(
    registry: Registry, pid: int, role: Role, name: str = "t", connection: int = 1
) -> registry_module.Tenant:
    fd = pidfd()
    tenant, _ = registry.register(name, role, 10, pid, fd, connection)
    os.close(fd)
    return tenant


def test_a_launcher_that_comes_back_is_the_same_tenant(registry: Registry) -> None:
    first = register(registry, 100, Role.OFFLINE, connection=1)
    first.launcher = None
    again = register(registry, 100, Role.OFFLINE, name="renamed", connection=2)
    assert again is first
    assert (again.name, again.launcher) == ("renamed", 2)
    assert len(registry.tenants) == 1


def test_two_tenants_of_one_name_can_be_told_apart(registry: Registry) -> None:
    names = {register(registry, pid, Role.OFFLINE, name="batch").name for pid in (100, 200)}
    assert names == {"batch", "batch-200"}


def test_a_tenant_stays_while_a_process_of_it_lives(registry: Registry) -> None:
    tenant = register(registry, 100, Role.ONLINE)
    process = Process(101, -1, tenant, "engine")
    registry.processes[101] = process
    registry.launcher_gone(tenant)
    assert registry.launchers == {}
    assert registry.tenants == {tenant.id: tenant}
    registry.process_gone(process)
    assert registry.tenants == {}


def pid_of(fd: int) -> int:
    return int(os.readlink(f"/proc/self/fd/{fd}").rpartition("-")[2].removesuffix(" (deleted)"))


class Tree:
    """A made-up process tree: pid -> children; `sharing` holds children with their parent's memory."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, children: dict[int, list[int]], sharing: set[int]
    ) -> None:
        self.children = children
        monkeypatch.setattr(registry_module, "children_of", lambda pid: self.children.get(pid, []))
        monkeypatch.setattr(registry_module, "shares_memory", lambda parent, child: child in sharing)
        monkeypatch.setattr(registry_module.os, "pidfd_open", lambda pid: os.memfd_create(f"pidfd-{pid}"))
        self.ended: set[int] = set()
        """Numbers of processes that have ended; a pidfd is a file of that name."""
        monkeypatch.setattr(registry_module, "has_ended", lambda fd: pid_of(fd) in self.ended)


def scan_of(registry: Registry, scan: Scan) -> set[int]:
    scan.update(registry)
    return set(scan.found)


def test_the_scan_finds_offline_subtrees_without_launchers_engines_and_helpers(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline, online = register(registry, 100, Role.OFFLINE), register(registry, 200, Role.ONLINE, name="on")
    assert online.role == Role.ONLINE
    registry.processes[110] = Process(110, -1, offline, "engine", helper_pid=111)
    Tree(monkeypatch, {100: [110, 120], 110: [111, 112], 111: [113], 120: [121], 200: [210]}, {111})
    scan = Scan()
    assert scan_of(registry, scan) == {112, 113, 120, 121}
    assert not scan.update(registry), "nothing changed"
    scan.close()


def test_a_child_that_shares_memory_is_given_time_to_connect_but_not_for_ever(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(registry, 100, Role.OFFLINE)
    Tree(monkeypatch, {100: [110], 110: [111]}, {111})
    scan = Scan()
    seen = [scan_of(registry, scan) for _ in range(SHARING_SCANS_MAX + 1)]
    assert seen[:-1] == [{110}] * SHARING_SCANS_MAX
    assert seen[-1] == {110, 111}
    scan.close()


def test_an_orphan_is_not_forgotten_when_its_launcher_dies(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = register(registry, 100, Role.OFFLINE)
    tree = Tree(monkeypatch, {100: [110], 110: [111]}, set())
    scan = Scan()
    assert scan_of(registry, scan) == {110, 111}
    registry.launcher_gone(tenant)
    tree.children = {110: [111, 112]}
    assert scan_of(registry, scan) == {110, 111, 112}
    scan.close()


def test_the_number_of_one_that_ended_is_looked_at_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate keeps a number that stays in the set for the process that it knows."""
    register(registry, 100, Role.OFFLINE)
    tree = Tree(monkeypatch, {100: [110, 120]}, set())
    scan = Scan()
    assert scan_of(registry, scan) == {110, 120}
    tree.ended = {110}
    assert scan_of(registry, scan) == {120}
    assert not scan.update(registry), "a zombie does not come and go"
    tree.ended = set()
    assert scan_of(registry, scan) == {110, 120}
    scan.close()


def test_a_scan_goes_on_where_a_process_cannot_be_opened(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(registry, 100, Role.OFFLINE)
    Tree(monkeypatch, {100: [110, 120]}, set())
    opens = registry_module.os.pidfd_open

    def refuse(pid: int) -> int:
        if pid == 110:
            raise OSError(errno.EINVAL, "kernels before 6.16 say this of one that was reaped")
        return opens(pid)

    monkeypatch.setattr(registry_module.os, "pidfd_open", refuse)
    scan = Scan()
    assert scan_of(registry, scan) == {120}
    scan.close()
