# SPDX-License-Identifier: Apache-2.0
"""Which offline processes a gate controls, and which of them may run when it is open.

Why it exists: a process is registered (its runtime is connected), scanned (it belongs to an offline tenant
but never connected) or lost (it was connected and lives), it passes from one to another, and its number may
come again for another process. The gate only wants to know whom to pause and whom to resume.

Threading model: the gate's thread. Caller: gate.py. Standard library only.
"""

from __future__ import annotations

import os
import select
from typing import Any

from valve_agent.devices.base import ComputeControl, TargetRefused


class Targets:
    """`all` is whom to pause: pass it to ComputeControl.pause. Closed descriptors leave the epoll set."""

    def __init__(self, compute: ComputeControl[Any], epoll: select.epoll) -> None:
        self._compute = compute
        self._epoll = epoll
        self.all: list[Any] = []
        self._registered: dict[int, Any] = {}  # by connection
        self._scanned: dict[int, Any] = {}  # by pid
        self._lost: dict[int, Any] = {}  # by pid
        self._by_pidfd: dict[int, Any] = {}

    def of_pidfd(self, fd: int) -> Any | None:
        return self._by_pidfd.get(fd)

    def of_connection(self, conn: int) -> Any:
        """Raises TargetRefused if it brought no offline process."""
        if conn not in self._registered:
            raise TargetRefused(f"connection {conn} belongs to no offline process that the gate controls")
        return self._registered[conn]

    @property
    def lost(self) -> list[Any]:
        """Must not run even while the gate is open: nothing can be told to them."""
        return list(self._lost.values())

    @property
    def runnable(self) -> list[Any]:
        """Whom to resume when the gate opens."""
        lost = self._lost.values()
        return [target for target in self.all if target not in lost]

    def register(self, conn: int, pid: int, pidfd: int, barrier: bool) -> Any:
        """A runtime connected. Takes over `pidfd`. Raises TargetRefused."""
        target = self._open(pid, pidfd, barrier)
        for before in (self._scanned.get(pid), self._lost.get(pid)):
            if before is not None:
                self.forget(before)
        self._registered[conn] = target
        return target

    def disconnect(self, conn: int) -> Any | None:
        """Its connection is gone. Returns it if it lives and is not connected otherwise: now it is lost."""
        target = self._registered.pop(conn, None)
        if target is None:
            return None
        if self._compute.is_gone(target) or any(
            other.pid == target.pid for other in self._registered.values()
        ):
            self.forget(target)
            return None
        self._lost[target.pid] = target
        return target

    def scan(self, pid: int, pidfd: int) -> Any | None:
        """The slow scan found it. Takes over `pidfd`. Returns what is newly under the gate's rule: a process
        that was not known, or a lost one, of which main has found that it holds no memory any more (it became
        another program). Raises TargetRefused."""
        for known in [target for target in self.all if target.pid == pid]:
            if self._compute.is_gone(known):
                self.forget(known)  # another process has its number now
        lost = self._lost.pop(pid, None)
        if lost is not None:
            os.close(pidfd)
            self._scanned[pid] = lost
            return lost
        if any(target.pid == pid for target in self.all):
            os.close(pidfd)
            return None
        self._scanned[pid] = self._open(pid, pidfd, False)
        return self._scanned[pid]

    def unscan(self, pid: int) -> Any | None:
        """The slow scan no longer counts it as offline. Returns it if it was scanned; `forget` it then."""
        return self._scanned.get(pid)

    def forget(self, target: Any) -> None:
        """Control it no longer; it stays as it is."""
        for known in (self._registered, self._scanned, self._lost):
            for key in [key for key, value in known.items() if value is target]:
                del known[key]
        self.all.remove(target)
        del self._by_pidfd[target.pidfd]
        self._epoll.unregister(target.pidfd)
        self._compute.close(target)

    def _open(self, pid: int, pidfd: int, barrier: bool) -> Any:
        try:
            target = self._compute.open(pid, pidfd, barrier)
        except TargetRefused:
            os.close(pidfd)
            raise
        self.all.append(target)
        self._by_pidfd[pidfd] = target
        self._epoll.register(pidfd, select.EPOLLIN)
        return target
