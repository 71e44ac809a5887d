# SPDX-License-Identifier: Apache-2.0
"""A gate in this process: real sockets, pages and policy, a device that only notes what it was told."""

from __future__ import annotations

import marshal
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from valve_agent import gate_stats
from valve_agent.devices.base import PauseTimeout
from valve_agent.gate import Gate, GateSettings
from valve_agent.gate_stats import StatsReader, StatsWriter
from valve_agent.shared import Page


@dataclass(eq=False)
class FakeTarget:
    pid: int
    pidfd: int


class FakeCompute:
    """ComputeControl: `running_pids` is the truth, `refuses_to_stop` are pids that pause cannot confirm."""

    def __init__(self) -> None:
        self.log: list[tuple[str, tuple[int, ...]]] = []
        self.running_pids: set[int] = set()
        self.refuses_to_stop: set[int] = set()
        self.gone: set[int] = set()
        self.copies_on: set[int] = set()
        self.uncontrollable: set[int] = set()
        self.to_tell: list[tuple[str, dict[str, object]]] = []

    def open(self, pid: int, pidfd: int, barrier: bool) -> FakeTarget:
        self.running_pids.add(pid)
        return FakeTarget(pid, pidfd)

    def close(self, target: FakeTarget) -> None:
        os.close(target.pidfd)

    def pause(self, targets: Sequence[FakeTarget]) -> None:
        self._note("pause", targets)
        self.running_pids -= {target.pid for target in targets} - self.refuses_to_stop
        stuck = [target.pid for target in targets if target.pid in self.refuses_to_stop]
        if stuck:
            raise PauseTimeout(stuck, 20_000, {})

    def resume(self, targets: Sequence[FakeTarget]) -> None:
        self._note("resume", targets)
        self.running_pids |= {target.pid for target in targets}

    def running(self, targets: Sequence[FakeTarget]) -> Sequence[FakeTarget]:
        return [target for target in targets if target.pid in self.running_pids]

    def quiesce(self, targets: Sequence[FakeTarget]) -> None:
        self._note("quiesce", targets)
        stuck = [target.pid for target in targets if target.pid in self.copies_on]
        if stuck:
            raise PauseTimeout(stuck, 20_000, {})

    def supply(self, target: FakeTarget, number: int, fds: Sequence[int]) -> None:
        self.log.append(("supply", (target.pid, number)))
        for fd in fds:
            os.close(fd)

    def withdraw(self, target: FakeTarget, number: int) -> None:
        self.log.append(("withdraw", (target.pid, number)))

    def tend(self, targets: Sequence[FakeTarget]) -> Sequence[tuple[FakeTarget, str]]:
        return [(target, "no route") for target in targets if target.pid in self.uncontrollable]

    def notes(self) -> Sequence[tuple[str, dict[str, object]]]:
        notes, self.to_tell = self.to_tell, []
        return notes

    def is_gone(self, target: FakeTarget) -> bool:
        return target.pid in self.gone

    def _note(self, what: str, targets: Sequence[FakeTarget]) -> None:
        self.log.append((what, tuple(target.pid for target in targets)))


class Bench:
    """A gate and main's ends of its sockets; `turn` is one turn of its loop."""

    def __init__(self, settings: GateSettings) -> None:
        self.compute = FakeCompute()
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        self.control, self.holds, self.events_end = [pair[0] for pair in pairs]
        self._theirs = [pair[1] for pair in pairs]
        for end in (self.holds, self.events_end, self._theirs[2]):
            end.setblocking(False)
        self.doorbell_fd = os.eventfd(0, os.EFD_NONBLOCK)
        stats_fd = gate_stats.create()
        self.stats = StatsReader(stats_fd)
        writer = StatsWriter(stats_fd)
        os.close(stats_fd)
        self.gate = Gate(self.compute, settings, *self._theirs, self.doorbell_fd, writer)
        self._pages: list[Page] = []
        self._pidfds: list[int] = []

    def turn(self) -> None:
        self.gate.turn()

    def call(self, name: str, arguments: tuple[int, ...], *fds: int) -> str | None:
        """A command of main; the gate's answer (None: done, else why not)."""
        socket.send_fds(self.control, [marshal.dumps((name, arguments))], list(fds))
        self.turn()
        answer: str | None = marshal.loads(self.control.recv(65536))
        return answer

    def page(self) -> tuple[int, Page]:
        fd, page = Page.create()
        self._pages.append(page)
        return fd, page

    def engine(self, conn: int, *, busy: bool = False) -> Page:
        fd, page = self.page()
        if busy:
            set_busy(page, True)
        assert self.call("engine", (conn, 1000 + conn), fd) is None
        os.close(fd)
        return page

    def target(self, conn: int, pid: int) -> Page:
        fd, page = self.page()
        pidfd = os.pidfd_open(os.getpid())
        assert self.call("target", (conn, pid, True), pidfd, fd) is None
        os.close(pidfd)
        os.close(fd)
        return page

    def ring(self) -> None:
        os.eventfd_write(self.doorbell_fd, 1)
        self.turn()

    def events(self) -> list[dict[str, Any]]:
        found = []
        while select.select([self.events_end], [], [], 0)[0]:
            found.append(marshal.loads(self.events_end.recv(65536)))
        return found

    def close(self) -> None:
        for page in self._pages:
            page.close()
        self.gate.close()
        for end in (self.control, self.holds, self.events_end, *self._theirs):
            end.close()
        self.stats.close()
        os.close(self.doorbell_fd)


def set_busy(page: Page, busy: bool, *, since_ns: int | None = None, changes: int = 1) -> None:
    """What libvalve writes when an engine turns busy or idle."""
    page._at.busy_since_ns = time.monotonic_ns() if since_ns is None else since_ns
    page._at.busy_seq = (page.busy_seq + changes) & 0xFFFFFFFF
    page._at.busy = int(busy)
