# SPDX-License-Identifier: Apache-2.0
"""The agent's end of a gate process: start it, tell it who is there, hold it, read what it did.

Why it exists: the gate does nothing but pause and resume, so everything that may be slow is here.

Threading model: one thread of main uses add_*, remove, set_scanned, read_events and stats; `hold` and
`release` may be called from any thread, and one `hold` waits at a time. If the gate dies every call raises
GateDied; the agent must then exit too (offline runtimes stop themselves when their lease ends).

    GateError              the gate refused or did not manage
    ├── GateDied           its process is gone
    ├── GateRefused        it lives, and says why not
    └── HoldTimeout        offline was not evicted in time; the hold is withdrawn
"""

from __future__ import annotations

import dataclasses
import itertools
import marshal
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from valve_agent import gate_stats
from valve_agent.gate import MESSAGE_BYTES, GateSettings
from valve_agent.gate_stats import GateStats, StatsReader
from valve_agent.pidfds import has_ended

__all__ = [
    "GateDied",
    "GateError",
    "GateHandle",
    "GateRefused",
    "GateSettings",
    "GateStats",
    "HoldResult",
    "HoldTimeout",
]

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from valve_agent.gate_main import main; main(sys.argv[2:])"
)
_ANSWER_TIMEOUT_S = 10.0
_EVENTS_BUFFER_BYTES = 1 << 20


class GateError(Exception):
    """The gate did not do it; the message says why."""


class GateDied(GateError):
    pass


class GateRefused(GateError):
    pass


class HoldTimeout(GateError):
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class HoldResult:
    """Offline is paused and evicted, and stays so until `release`."""

    asked_ns: int
    held_ns: int

    @property
    def waited_us(self) -> float:
        return (self.held_ns - self.asked_ns) / 1e3


class GateHandle:
    """See the module. Made by `start`; `close` ends the gate, which leaves offline paused."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        doorbell_fd: int,
        control: socket.socket,
        holds: socket.socket,
        events: socket.socket,
        stats: StatsReader,
    ) -> None:
        self._process = process
        self.doorbell_fd = doorbell_fd
        self._control = control
        self._hold_socket = holds
        self._events = events
        self._stats = stats
        self._control_lock = threading.Lock()
        self._hold_lock = threading.Lock()
        self._tokens = itertools.count(1)
        self._held: list[int] = []
        self._scanned: set[int] = set()
        self._registered: dict[int, int] = {}  # connection -> pid of an offline process

    @classmethod
    def start(
        cls, device: str, settings: GateSettings | None = None, common_doorbell_fd: int = -1
    ) -> GateHandle:
        """Start the gate of `device`. Offline counts as paused until recovery_grace is over.
        `common_doorbell_fd`: see gate.Gate; stays the caller's."""
        chosen = settings or GateSettings()
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        theirs[2].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _EVENTS_BUFFER_BYTES)
        ours[2].setblocking(False)
        doorbell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stats_fd = gate_stats.create()
        package_root = str(Path(__file__).resolve().parent.parent)
        passed = [*(end.fileno() for end in theirs), doorbell_fd, stats_fd]
        inherited = [fd for fd in (*passed, common_doorbell_fd) if fd >= 0]
        command = [sys.executable, "-S", "-E", "-s", "-P", "-c", _BOOT, package_root, device]
        process = subprocess.Popen(
            [*command, *(str(value) for value in (*passed, common_doorbell_fd, *chosen))],
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
        )
        for end in theirs:
            end.close()
        stats = StatsReader(stats_fd)
        os.close(stats_fd)
        handle = cls(process, doorbell_fd, ours[0], ours[1], ours[2], stats)
        try:
            handle._call("ready", ())
        except GateError:
            handle.close()
            raise
        return handle

    @property
    def pid(self) -> int:
        return self._process.pid

    def change(self, settings: GateSettings) -> None:
        """Other settings from now on; recovery_grace_ns matters only at the start."""
        self._call("settings", settings)

    # -- who is there ----------------------------------------------------------------------

    def add_engine(self, conn: int, pid: int, page_fd: int) -> None:
        """An online process. `page_fd` (see shared.Page.create) stays the caller's."""
        self._call("engine", (conn, pid), page_fd)

    def add_target(self, conn: int, pid: int, pidfd: int, page_fd: int, barrier: bool) -> None:
        """An offline process; on return it is paused if the gate is closed, and running if it is open.
        `barrier`: it registered for membarrier (HelloFlag.BARRIER). Descriptors stay the caller's.
        Raises GateRefused if it cannot be controlled: such a process must be refused."""
        self._call("target", (conn, pid, barrier), pidfd, page_fd)
        self._registered[conn] = pid
        self._scanned.discard(pid)  # the gate has moved it

    def supply(self, conn: int, number: int, fds: Sequence[int]) -> None:
        """Descriptors of an offline process that the device needs; see ComputeControl.supply. They stay the
        caller's. Raises GateRefused: such a process must be refused."""
        self._call("supply", (conn, number), *fds)

    def withdraw(self, conn: int, number: int) -> None:
        """The process has closed them."""
        self._call("withdraw", (conn, number))

    def remove(self, conn: int) -> None:
        """The connection is gone. An offline process that lives is paused until add_target brings it back."""
        self._registered.pop(conn, None)
        self._call("remove", (conn,))

    def set_scanned(self, pids: Mapping[int, int]) -> None:
        """All processes of offline subtrees that did not register: pid -> pidfd, which stay the caller's.
        Leave out launchers and address-space helpers: a stopped helper cannot remap. A registered
        process among them is ignored. One that is gone is ignored too; raises GateRefused for one that
        cannot be controlled."""
        refused = []
        for pid in self._scanned - pids.keys():
            try:
                self._call("scan_remove", (pid,))
            except GateRefused as error:
                refused.append(str(error))
        self._scanned &= pids.keys()
        for pid in sorted(pids.keys() - self._scanned - set(self._registered.values())):
            try:
                self._call("scan_add", (pid,), pids[pid])
            except GateRefused as error:
                if not has_ended(pids[pid]):
                    refused.append(str(error))
                continue
            self._scanned.add(pid)
        if refused:
            raise GateRefused("; ".join(refused))

    # -- holds -----------------------------------------------------------------------------

    def hold(self, timeout_s: float) -> HoldResult:
        """Returns when offline is paused and evicted; it stays so until `release`. Holds nest.
        Raises HoldTimeout, and then the hold is withdrawn; GateDied."""
        deadline = time.monotonic() + timeout_s
        if not self._hold_lock.acquire(timeout=timeout_s):
            raise HoldTimeout(f"another hold has been waited for longer than {timeout_s} s")
        try:
            return self._hold(deadline, timeout_s)
        finally:
            self._hold_lock.release()

    def _hold(self, deadline: float, timeout_s: float) -> HoldResult:
        token = next(self._tokens)
        self._send_hold(True, token)
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._hold_socket], [], [], left_s)[0]:
                self._send_hold(False, token)
                raise HoldTimeout(
                    f"offline was not evicted within {timeout_s} s; the gate's events name the process"
                )
            try:
                data = self._hold_socket.recv(MESSAGE_BYTES)
            except OSError as error:  # it died without having read what we sent
                raise self._died() from error
            if not data:
                raise self._died()
            answered, asked_ns, held_ns = marshal.loads(data)
            if answered == token:  # else the late answer to a hold that timed out
                self._held.append(token)
                return HoldResult(asked_ns, held_ns)

    def release(self) -> None:
        """End one hold. Raises GateRefused if there is none."""
        try:
            token = self._held.pop()
        except IndexError as error:
            raise GateRefused("release without a hold") from error
        self._send_hold(False, token)

    def _send_hold(self, wanted: bool, token: int) -> None:
        try:
            self._hold_socket.send(marshal.dumps((wanted, token)))
        except OSError as error:
            raise self._died() from error

    # -- what happened ---------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when read_events has something, or the gate died."""
        return self._events.fileno()

    def read_events(self) -> list[dict[str, Any]]:
        """Everything that happened since the last call, oldest first, without waiting. Each has `event` and
        `t_ns`: busy, idle, missed_busy, pause, resume, pause_timeout, pause_confirmed (after a timeout that
        no `pause` follows), violation, kill, target_gone.
        Raises GateDied once the gate is gone and all is read."""
        events: list[dict[str, Any]] = []
        while True:
            try:
                data = self._events.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return events
            except ConnectionResetError:
                data = b""
            if not data:
                if events:
                    return events
                raise self._died()
            events.append(marshal.loads(data))

    def stats(self) -> GateStats:
        return self._stats.read()

    def close(self) -> None:
        """End the gate and wait for it. It pauses every target before it goes."""
        for end in (self._control, self._hold_socket, self._events):
            end.close()
        try:
            self._process.wait(_ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stats.close()
        os.close(self.doorbell_fd)

    def _call(self, name: str, arguments: tuple[float, ...], *fds: int) -> None:
        with self._control_lock:
            try:
                socket.send_fds(self._control, [marshal.dumps((name, tuple(arguments)))], list(fds))
                if not select.select([self._control], [], [], _ANSWER_TIMEOUT_S)[0]:
                    raise GateDied(f"the gate has not answered for {_ANSWER_TIMEOUT_S} s; restart the agent")
                data = self._control.recv(MESSAGE_BYTES)
            except OSError as error:
                raise self._died() from error
        if not data:
            raise self._died()
        refusal = marshal.loads(data)
        if refusal is not None:
            raise GateRefused(refusal)

    def _died(self) -> GateDied:
        code = self._process.poll()
        return GateDied(
            f"the gate process is gone (exit status {code}); its standard error says why. Restart the agent"
        )
