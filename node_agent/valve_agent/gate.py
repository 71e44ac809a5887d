# SPDX-License-Identifier: Apache-2.0
"""The gate process: turns a ring of the doorbell into stopped offline processes.

Why it exists: preemption must never wait for anything else the agent does, so it has a process of its own
with one thread, a frozen garbage collector and only the modules it needs.

The loop waits for the doorbell, for commands of the agent's main process and for the end of offline
processes; its timeout is the policy's deadline or the next heartbeat. A ring is handled first: read the
pages, ask the policy, pause; only then are events sent, counters kept, pages and holds answered.

It fails closed. A process that is not confirmed within one `pause` is tried again every millisecond and
killed after `kill_after_ns`, with an event that says why; so is one that somebody continues again and
again. When main is gone (end of file on the control socket) or the gate itself fails, every target is paused
before it exits: nobody would be left to do it.

Threading model: one thread, one process per device; nothing in it blocks but epoll and `pause` (at most
20 ms). Started by gate_link.GateHandle, which also speaks the other end of its sockets. Messages are
marshalled tuples between two copies of one interpreter, never data from a tenant.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from valve_agent.devices.base import ComputeControl, PauseTimeout, TargetRefused
from valve_agent.gate_stats import StatsWriter
from valve_agent.gate_targets import Targets
from valve_agent.policy.gate import Action, GatePolicy
from valve_agent.shared import Gate as GateState
from valve_agent.shared import Page, SharedMemoryError

RETRY_NS = 1_000_000
STRIKES_MAX = 5
"""Heartbeats of one pause that may find a paused process running before it is killed. One or two are somebody
at a shell; more are a process that evades the gate."""
EVENTS_QUEUED = 65_536
MESSAGE_BYTES = 65_536
PIDS_TOLD_MAX, WHY_CHARACTERS_MAX = 1024, 4096
_LATENCY_MAX_NS = 60_000_000_000  # a busy_since_ns older than this is no clock of ours
_MISSED_MAX = 16  # of one look: busy_seq is written by a tenant
_SEQ_MASK = 0xFFFFFFFF

_clock = time.monotonic_ns


class GateSettings(NamedTuple):
    """What the gate needs to know. The agent fills it from its policy (valve_api documents the fields there);
    the defaults are for benches and tests."""

    cooldown_factor: float = 2.0
    cooldown_min_ns: int = 2_000_000
    cooldown_max_ns: int = 1_000_000_000
    recovery_grace_ns: int = 1_000_000_000
    lease_ns: int = 1_000_000_000
    kill_after_ns: int = 1_000_000_000
    """An offline process that cannot be paused for so long is killed: it would disturb online unseen."""


class _Engine:
    """An online process as last seen in its page."""

    __slots__ = ("busy", "conn", "page", "pid", "seq")

    def __init__(self, conn: int, pid: int, page: Page) -> None:
        self.conn = conn
        self.pid = pid
        self.page = page
        self.seq = 0
        self.busy = False


class _Cause(NamedTuple):
    """What made the policy act: for the event and for the latency sample."""

    reason: str
    conn: int
    since_ns: int  # 0: no latency is defined
    of_policy: bool = True  # False: offline was paused already, one process was not


_NO_CAUSE = _Cause("", 0, 0)


class Gate:
    """One device's gate; see the module. `run` returns when main is gone or says so."""

    def __init__(
        self,
        compute: ComputeControl[Any],
        settings: GateSettings,
        control: socket.socket,
        holds: socket.socket,
        events: socket.socket,
        doorbell_fd: int,
        stats: StatsWriter,
        common_doorbell_fd: int = -1,
    ) -> None:
        """`common_doorbell_fd`: the one that engines on several devices ring, shared by the gates of all of
        them, so nobody reads it; -1: there is none."""
        now = _clock()
        self._compute = compute
        self._settings = settings
        self._control = control
        self._hold_socket = holds
        self._events = events
        self._doorbell_fd = doorbell_fd
        self._doorbells = {doorbell_fd, common_doorbell_fd}
        self._stats = stats
        self._policy = GatePolicy(
            settings.cooldown_factor,
            settings.cooldown_min_ns,
            settings.cooldown_max_ns,
            settings.recovery_grace_ns,
            now,
        )
        self._engines: dict[int, _Engine] = {}
        self._pages: dict[int, Page] = {}  # of every connection, online and offline
        self._evicted = True  # every target is known to be off; never True while open
        self._quiesced = False  # and nothing of them touches memory
        self._failing_ns: dict[Any, int] = {}  # since when a target could not be controlled
        self._unconfirmed_ns = 0  # since when the policy says paused and a target is not known to be off
        self._retry_ns = 0
        self._open_cause = _NO_CAUSE
        self._wake_ns = now
        self._waiting_holds: list[tuple[int, int]] = []
        self._beat_every_ns = settings.lease_ns // 4
        self._beat_ns = now
        self._strikes: dict[Any, int] = {}  # of the pause in force
        self._killed: set[Any] = set()  # and not gone yet
        self._outbox: deque[bytes] = deque()
        self._done = False
        self._epoll = select.epoll()
        for fd in (doorbell_fd, control.fileno(), holds.fileno()):
            self._epoll.register(fd, select.EPOLLIN)
        if common_doorbell_fd >= 0:  # by its edges: a gate that read it would take the ring from the others
            self._epoll.register(common_doorbell_fd, select.EPOLLIN | select.EPOLLET)
        self._targets = Targets(compute, self._epoll)

    # -- the loop --------------------------------------------------------------------------

    def run(self) -> None:
        """Until main is gone; then, and if anything fails, every target is paused."""
        turn = self.turn
        try:
            while not self._done:
                turn()
        finally:
            self._fail_closed()

    def turn(self) -> None:
        """Wait for something and handle it: a ring first."""
        ready = self._epoll.poll(self._timeout_s(), 16)
        now = self._wake_ns = _clock()
        fds = {fd for fd, _ in ready}
        if fds & self._doorbells:
            self._drain_doorbell()
            self._look()
        for fd in fds - self._doorbells:
            if fd == self._control.fileno():
                self._on_control()
            elif fd == self._hold_socket.fileno():
                self._on_hold()
            else:
                self._drop_dead(fd)
        self._periodic(now)
        for event, fields in self._compute.notes():
            self._emit(event, now, **fields)
        if self._outbox:
            self._flush()

    def close(self) -> None:
        """Give back what this object opened; the process ends anyway, tests do not."""
        for target in list(self._targets.all):
            self._targets.forget(target)
        for page in self._pages.values():
            page.close()
        self._epoll.close()

    def _timeout_s(self) -> float:
        until = self._beat_ns + self._beat_every_ns
        deadline = self._policy.deadline_ns()
        if deadline is not None and deadline < until:
            until = deadline
        if self._unconfirmed_ns and self._retry_ns < until:
            until = self._retry_ns
        if self._outbox:
            until = min(until, _clock() + 10 * RETRY_NS)
        return max(0.0, (until - _clock()) / 1e9)

    def _periodic(self, now: int) -> None:
        self._act(self._policy.tick(now), _NO_CAUSE)
        if self._unconfirmed_ns and now >= self._retry_ns:
            self._retry(now)
        if now - self._beat_ns >= self._beat_every_ns:
            late = now - self._beat_ns > self._settings.lease_ns
            self._beat(now)
            # A ring can get lost with a runtime that dies between its store and its write.
            self._look()
            self._recheck(self._targets.all if self._policy.paused else self._targets.lost)
            if not self._policy.paused:
                self._tend(now)
            if late and not self._policy.paused:
                # We were not scheduled for longer than the lease, so runtimes may have stopped themselves.
                self._compute.resume(self._targets.runnable)

    def _beat(self, now: int) -> None:
        """Sign of life and gate state into every page."""
        self._beat_ns = now
        state = GateState.PAUSED if self._evicted else GateState.OPEN
        if self._unconfirmed_ns:
            state = GateState.UNKNOWN
        for page in self._pages.values():
            page.gate = state
            page.heartbeat_ns = now

    # -- hot path --------------------------------------------------------------------------

    def _drain_doorbell(self) -> None:
        try:
            os.eventfd_read(self._doorbell_fd)
        except BlockingIOError:
            return  # another look has taken it

    def _look(self) -> None:
        """Read every online page and tell the policy what changed."""
        for engine in self._engines.values():
            page = engine.page
            seq = page.busy_seq
            busy = page.busy
            if seq != engine.seq or busy != engine.busy:
                self._changed(engine, seq, busy)

    def _changed(self, engine: _Engine, seq: int, busy: bool) -> None:
        """`busy` counts as a level, `seq` as a count of its changes. The two are separate stores, so one
        may be ahead of the other: parity tells, and the missing half is expected at the next look."""
        changes = (seq - engine.seq) & _SEQ_MASK
        policy = self._policy
        flipped = busy != engine.busy
        if flipped != (changes & 1 == 1):
            seq = (seq + 1 if flipped else seq - 1) & _SEQ_MASK
            changes = (seq - engine.seq) & _SEQ_MASK
        engine.seq = seq
        engine.busy = busy
        if flipped and busy:
            since = engine.page.busy_since_ns
            cause = _Cause("busy", engine.conn, since)
            self._act(policy.busy(engine.conn, self._wake_ns), cause)
            self._emit("busy", since or self._wake_ns, conn=engine.conn, pid=engine.pid)
        elif flipped:
            gap = engine.page.decode_gap_ns
            self._act(policy.idle(engine.conn, gap, self._wake_ns), _NO_CAUSE)
            self._emit("idle", self._wake_ns, conn=engine.conn, pid=engine.pid, decode_gap_us=gap / 1e3)
        missed = changes // 2
        if missed:
            cause = _Cause("missed_busy", engine.conn, 0)
            for _ in range(min(missed, _MISSED_MAX)):
                self._act(policy.missed_busy(engine.conn, self._wake_ns), cause)
            self._stats.count("missed_busy", missed)
            self._emit("missed_busy", self._wake_ns, conn=engine.conn, pid=engine.pid, periods=missed)

    def _act(self, action: Action, cause: _Cause) -> None:
        if action is Action.PAUSE:
            self._pause(cause)
        elif action is Action.RESUME:
            self._resume()

    def _pause(self, cause: _Cause) -> None:
        self._open_cause = cause
        try:
            self._compute.pause(self._targets.all)
        except PauseTimeout as error:
            self._unconfirmed(error)
            return
        self._confirmed(_clock())

    def _confirmed(self, now: int) -> None:
        """Offline is off the device: everything here happens after the pause."""
        cause = self._open_cause
        self._evicted = True
        self._unconfirmed_ns = 0
        stop_ns = now - self._wake_ns
        latency_ns = now - cause.since_ns if cause.since_ns else 0
        if cause.since_ns and 0 < latency_ns < _LATENCY_MAX_NS:
            self._stats.sample(latency_ns, stop_ns)
        elif cause.since_ns:
            self._stats.count("bad_clocks")
            latency_ns = 0
        self._beat(now)
        self._answer_holds(now)
        if cause.of_policy:
            self._stats.count("pauses")
        self._emit(
            "pause" if cause.of_policy else "pause_confirmed",
            now,
            reason=cause.reason,
            conn=cause.conn,
            latency_us=latency_ns / 1e3 if latency_ns else None,
            stop_us=stop_ns / 1e3,
            targets=len(self._targets.all),
        )

    def _resume(self) -> None:
        self._evicted = self._quiesced = False
        self._unconfirmed_ns = 0
        self._strikes.clear()
        self._failing_ns.clear()  # while all were paused nobody tended them
        self._compute.resume(self._targets.runnable)
        now = _clock()
        self._beat(now)
        self._stats.count("resumes")
        self._emit("resume", now, targets=len(self._targets.all))

    # -- what did not go well --------------------------------------------------------------

    def _unconfirmed(self, error: PauseTimeout) -> None:
        now = _clock()
        if not self._unconfirmed_ns:
            self._unconfirmed_ns = self._wake_ns
            self._stats.count("timeouts")
            self._emit("pause_timeout", now, pids=list(error.pids), why=str(error))
        self._evicted = False
        self._retry_ns = now + RETRY_NS

    def _retry(self, now: int) -> None:
        if now - self._unconfirmed_ns > self._settings.kill_after_ns:
            self._kill_unpausable(now)
        try:
            self._compute.pause(self._targets.all)
        except PauseTimeout as error:
            self._unconfirmed(error)
            return
        self._wake_ns = self._unconfirmed_ns
        self._confirmed(_clock())

    def _kill_unpausable(self, now: int) -> None:
        waited_ms = (now - self._unconfirmed_ns) / 1e6
        for target in self._compute.running(self._targets.all):
            self._kill(target, f"could not be paused for {waited_ms:.0f} ms")

    def _kill(self, target: Any, why: str) -> None:
        outcome = "so it was killed"
        try:
            signal.pidfd_send_signal(target.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return  # it has ended since it was looked at; its pidfd tells so in the next turn
        except PermissionError:
            outcome = "and the agent may not kill it (run the agent as root)"
        if target in self._killed:
            return  # it has been told of
        self._killed.add(target)
        self._stats.count("kills")
        sentence = (
            f"process {target.pid} {why}, {outcome}: an offline process that Valve cannot pause must not "
            "share the device"
        )
        self._emit("kill", _clock(), pid=target.pid, why=sentence)

    def _tend(self, now: int) -> None:
        """Let the device prepare, and end what it could not control for too long."""
        failing = dict(self._compute.tend(self._targets.runnable))
        self._failing_ns = {target: self._failing_ns.get(target, now) for target in failing}
        for target, since in self._failing_ns.items():
            if now - since > self._settings.kill_after_ns:
                self._kill(target, f"cannot be controlled: {failing[target]}")

    def _recheck(self, targets: Sequence[Any]) -> None:
        """Stop again what somebody else continued."""
        if self._unconfirmed_ns:
            return  # the next retry pauses all of them
        running = self._compute.running(targets)
        if not running:
            return
        self._stats.count("violations", len(running))
        self._pause_some(running, "violation")
        self._emit("violation", _clock(), pids=[target.pid for target in running])
        for target in running:
            self._strikes[target] = self._strikes.get(target, 0) + 1
            if self._strikes[target] >= STRIKES_MAX:
                self._kill(target, f"was continued by somebody {STRIKES_MAX} times while offline was paused")

    def _pause_some(self, targets: Sequence[Any], reason: str) -> None:
        """Pause targets that should be paused already. If the gate is open (they are lost ones) and it does
        not work, the next heartbeat tries again."""
        try:
            self._compute.pause(targets)
            if self._quiesced:
                self._compute.quiesce(targets)
        except PauseTimeout as error:
            if self._policy.paused:
                self._open_cause = _Cause(reason, 0, 0, False)
                self._unconfirmed(error)
            else:
                self._stats.count("timeouts")
                self._emit("pause_timeout", _clock(), pids=list(error.pids), why=str(error))

    def _fail_closed(self) -> None:
        try:
            self._compute.pause(self._targets.all)
        except (PauseTimeout, OSError):
            for target in self._targets.all:  # what is wrong with one must leave no other running
                try:
                    self._compute.pause([target])
                except (PauseTimeout, OSError) as error:
                    print(f"valve gate: exiting with an offline process not paused: {error}", file=sys.stderr)

    def _admit(self, target: Any) -> None:
        """From now on it does as the gate says; before the answer goes out it is paused if the gate is."""
        if self._policy.paused:
            self._pause_some([target], "attach")
        else:
            self._compute.resume([target])  # it may have stopped itself when its lease ended

    def _drop_dead(self, pidfd: int) -> None:
        target = self._targets.of_pidfd(pidfd)
        if target is not None:  # else it was dropped earlier in this turn
            self._emit("target_gone", self._wake_ns, pid=target.pid)
            self._killed.discard(target)
            self._targets.forget(target)

    # -- main's commands -------------------------------------------------------------------

    def _on_control(self) -> None:
        data, fds, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, 4)
        if not data:
            self._done = True
            return
        name, arguments = marshal.loads(data)
        try:
            getattr(self, "_do_" + name)(*arguments, *fds)
            answer = None
        except (TargetRefused, SharedMemoryError, OSError) as error:
            answer = str(error)
        self._control.send(marshal.dumps(answer))

    def _map_page(self, conn: int, fd: int) -> Page:
        try:
            page = Page(fd)
        finally:
            os.close(fd)
        self._pages[conn] = page
        page.gate = GateState.PAUSED if self._evicted else GateState.OPEN
        page.heartbeat_ns = _clock()
        return page

    def _do_ready(self) -> None:
        """Nothing to do: the answer says that the loop runs."""

    def _do_settings(self, *numbers: float) -> None:
        """Tenants keep the lease of their WELCOME, so the shortest one is kept to."""
        wanted = GateSettings._make(numbers)
        self._policy.set_cooldown(wanted.cooldown_factor, wanted.cooldown_min_ns, wanted.cooldown_max_ns)
        self._settings = wanted._replace(lease_ns=min(wanted.lease_ns, self._settings.lease_ns))
        self._beat_every_ns = self._settings.lease_ns // 4

    def _do_engine(self, conn: int, pid: int, page_fd: int) -> None:
        page = self._map_page(conn, page_fd)
        engine = self._engines[conn] = _Engine(conn, pid, page)
        engine.seq = page.busy_seq
        engine.busy = page.busy
        since = page.busy_since_ns if engine.busy else 0
        action = self._policy.engine_joined(conn, engine.busy, self._wake_ns)
        self._act(action, _Cause("busy", conn, since))
        if engine.busy:
            self._emit("busy", since or self._wake_ns, conn=conn, pid=pid)

    def _do_target(self, conn: int, pid: int, barrier: bool, pidfd: int, page_fd: int) -> None:
        self._map_page(conn, page_fd)
        try:
            if any(engine.pid == pid for engine in self._engines.values()):
                raise TargetRefused(f"process {pid} is online: it is never paused")
            target = self._targets.register(conn, pid, pidfd, barrier)
        except TargetRefused:
            self._pages.pop(conn).close()
            raise
        self._admit(target)

    def _do_supply(self, conn: int, number: int, *fds: int) -> None:
        try:
            target = self._targets.of_connection(conn)
            self._compute.supply(target, number, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self._admit(target)

    def _do_withdraw(self, conn: int, number: int) -> None:
        self._compute.withdraw(self._targets.of_connection(conn), number)

    def _do_remove(self, conn: int) -> None:
        engine = self._engines.pop(conn, None)
        if engine is not None:
            self._act(self._policy.engine_gone(conn, self._wake_ns), _NO_CAUSE)
        page = self._pages.pop(conn, None)
        if page is not None:
            page.close()
        lost = self._targets.disconnect(conn)
        if lost is not None:
            # Nobody can tell it to stop or to give up memory: it must not run until it is back.
            self._pause_some([lost], "lost")

    def _do_scan_add(self, pid: int, pidfd: int) -> None:
        target = self._targets.scan(pid, pidfd)
        if target is not None:
            self._admit(target)

    def _do_scan_remove(self, pid: int) -> None:
        target = self._targets.unscan(pid)
        if target is not None:
            self._compute.resume([target])
            self._targets.forget(target)

    def _on_hold(self) -> None:
        data = self._hold_socket.recv(MESSAGE_BYTES)
        if not data:
            self._done = True
            return
        wanted, token = marshal.loads(data)
        if wanted:
            self._waiting_holds.append((token, self._wake_ns))
            self._act(self._policy.hold(token, self._wake_ns), _Cause("hold", 0, 0))
            if self._evicted:
                self._answer_holds(_clock())
        else:
            self._waiting_holds = [entry for entry in self._waiting_holds if entry[0] != token]
            self._act(self._policy.release(token, self._wake_ns), _NO_CAUSE)

    def _answer_holds(self, now: int) -> None:
        if not self._waiting_holds:
            return
        if not self._quiesced:
            try:
                self._compute.quiesce(self._targets.all)
            except PauseTimeout as error:
                self._unconfirmed(error)
                return
            self._quiesced, now = True, _clock()
        for token, asked_ns in self._waiting_holds:
            self._hold_socket.send(marshal.dumps((token, asked_ns, now)))
        self._waiting_holds.clear()

    # -- events ----------------------------------------------------------------------------

    def _emit(self, event: str, t_ns: int, **fields: Any) -> None:
        """Queue an event; sent at the end of the turn. A main that does not read loses the oldest. It must
        fit one message, however many processes it is about."""
        if "pids" in fields:
            fields["pids"] = fields["pids"][:PIDS_TOLD_MAX]
        if "why" in fields:
            fields["why"] = fields["why"][:WHY_CHARACTERS_MAX]
        self._outbox.append(marshal.dumps({"event": event, "t_ns": t_ns, **fields}))
        if len(self._outbox) > EVENTS_QUEUED:
            self._outbox.popleft()
            self._stats.count("events_dropped")

    def _flush(self) -> None:
        outbox = self._outbox
        try:
            while outbox:
                self._events.send(outbox[0])
                outbox.popleft()
        except BlockingIOError:
            return  # main's buffer is full: the next turn goes on
        except (BrokenPipeError, ConnectionResetError):
            self._done = True
