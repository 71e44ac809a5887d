# SPDX-License-Identifier: Apache-2.0
"""What the agent does with a frame, a lost connection, a dead process and the passing of time.

Why it exists: here identity, registry, pool, gate and memory meet. The order of steps matters and is stated
where it does: an offline process is under the gate before it hears WELCOME, its pages are discarded before
its slabs count as free, and online hears GRANT before offline is released.

Threading model: the server thread only. Callers: server.py (Handler), pool.py (Effects), main.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from valve_agent import gpu_link, watchdog, wire
from valve_agent.arenas import Arenas
from valve_agent.connection import Connection, Kind
from valve_agent.devices.base import DeviceError, MemoryPool
from valve_agent.devices.cpu.kernel import set_slice
from valve_agent.events import EventLog, Labelled
from valve_agent.gate_link import GateDied, GateError, GateRefused, HoldTimeout
from valve_agent.gpu_limits import GpuLimits
from valve_agent.gpu_watch import GpuWatch
from valve_agent.holds import Gate, HoldWorker
from valve_agent.identity import Identity, IdentityError
from valve_agent.policy.rate import RateLimit
from valve_agent.pool import Holder, Pool
from valve_agent.registry import Link, Process, Registry, Scan, Tenant
from valve_agent.server import Server
from valve_agent.shared import LedgerCopy, Page
from valve_agent.siblings import NoSiblings, Siblings
from valve_agent.slab_moves import SlabMoves
from valve_agent.usage import Usage
from valve_agent.wire import RejectCode, Role

SCAN_NS = 1_000_000_000
QUICK_HOLD_S = 0.002
"""The longest that the server thread itself waits for the gate."""
SLICE_NS = 100_000
"""Turns of a helper on the CPU: an online request waits for it in a reclaim, and short turns come soon."""
REJECTS_LOGGED_PER_MINUTE = 120
"""Anybody may connect and be refused; the log must not fill the disk for it."""
_POOL, _MOVES, _STRANGERS = "pool", "moves", "strangers"
"""Who asked for a hold."""
COUNTERS = ("requests", "tokens", "recomputed", "lost_blocks", "recomputed_tokens")


class AgentFailed(Exception):
    """The agent cannot go on; it must end so that runtimes fail safe and a successor starts clean."""


class Agent:
    """One device's. See the module. `pool` is set by main after construction: each needs the other."""

    pool: Pool
    moves: SlabMoves | None = None
    """Set by main where the agent maps memory itself (nvidia)."""
    limits: GpuLimits | None = None
    """Likewise: what tenants may allocate beside their arenas."""
    siblings: Siblings = NoSiblings()
    """Likewise, where the machine has several devices."""

    def __init__(
        self,
        *,
        settings: Any,
        server: Server,
        gate: Gate,
        memory: MemoryPool[Any],
        registry: Registry,
        identity: Identity[Tenant],
        events: EventLog | Labelled,
        device: wire.Device = wire.Device.CPU,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`settings`: valve_api.settings.EffectiveSettings."""
        self.settings = settings
        self.server = server
        self.gate = gate
        self.memory = memory
        self.registry = registry
        self.identity = identity
        self.events = events
        self.device = device
        self.started_ns = clock()
        self.paused = True
        self.route: Mapping[str, Any] = {}
        """How this device's compute is controlled and why; empty on a device with one way."""
        self.holds_standing = 0
        """Offline is paused and evicted until as many releases."""
        self._strangers = ""
        """`asked` or `held`: offline gets no compute, because somebody unknown uses the device."""
        self.usage = Usage(self.started_ns)
        self.retired: dict[str, dict[str, int]] = {}
        """Tenant -> counters of processes that are gone."""
        self.closing = False
        """Set when the agent ends: nothing is accounted for any more, and the gate may be dead."""
        self.rejects = 0
        self._rejects_unsaid = 0
        self._reject_log = RateLimit(REJECTS_LOGGED_PER_MINUTE, REJECTS_LOGGED_PER_MINUTE, self.started_ns)
        self._clock = clock
        self._by_connection: dict[int, Process] = {}
        self._guests: dict[int, Process] = {}
        """Connection -> engine of another device's agent that uses this device too."""
        self._launchers: dict[int, Tenant] = {}
        self.arenas = Arenas(memory, self)
        self._scan = Scan()
        self._unscanned = ""
        """Why the gate refused some of `_scan`: it is told of all again."""
        self._scan_ns = 0
        self._holds = HoldWorker(gate, server.wake)
        self.on_second: Callable[[], None] = lambda: None
        server.watch(gate.fileno(), self._on_gate)

    def close(self) -> None:
        self._holds.close()
        self._scan.close()

    # Handler: what the server sees ------------------------------------------------------------------

    def on_frame(self, connection: Connection, frame: wire.Frame, fds: list[int]) -> None:
        if connection.kind is Kind.NEW:
            if isinstance(frame, wire.Tenant):
                self._on_tenant(connection, frame)
                return
            if isinstance(frame, wire.Hello):
                self._on_hello(connection, frame)
                return
            if isinstance(frame, wire.MemoryOpen) and self.moves is not None:
                self.moves.on_open(connection, frame)
                return
        if connection.kind is Kind.MEMORY and self.moves is not None:
            self.moves.on_frame(connection, frame, fds)
            return
        process = self._by_connection.get(connection.id)
        if process is not None:
            if isinstance(frame, gpu_link.FRAMES):
                gpu_link.on_frame(self.gate, process, frame, fds)
                return
            if isinstance(frame, wire.ArenaOpen):
                self.arenas.on_open(connection, process, frame)
                return
            if isinstance(frame, wire.ArenaRestore):
                self.arenas.on_restore(process, frame, fds)
                return
            if process.memory is not None:
                holder = process.memory.holder
                if self.limits is not None:
                    self.limits.refresh()
                if isinstance(frame, wire.Want):
                    self.emit_for(process, "want", total=frame.total, urgent=frame.urgent, level="debug")
                    self.pool.on_want(holder, frame.total)
                    return
                if isinstance(frame, wire.Return):
                    self.arenas.give_back(process, int(frame.set))
                    return
                if isinstance(frame, wire.Reclaimed):
                    self.pool.on_reclaimed(holder, frame.id, int(frame.set))
                    return
        for fd in fds:
            os.close(fd)
        raise wire.BadField(f"{frame.TYPE.name} is not expected now (this peer is {connection.kind.value})")

    def on_protocol_error(self, connection: Connection, error: Exception) -> None:
        self.rejects += 1
        if not self._reject_log.allow(self._clock()):
            self._rejects_unsaid += 1
            return
        self.events.emit(
            "reject", level="warning", pid=connection.peer.pid, uid=connection.peer.uid,
            error=type(error).__name__, why=str(error), unsaid=self._rejects_unsaid,
        )  # fmt: skip
        self._rejects_unsaid = 0

    def on_closed(self, connection: Connection, why: str) -> None:
        if self.closing:
            return
        if connection.kind is Kind.MEMORY and self.moves is not None:
            self.moves.on_closed(connection)
        tenant = self._launchers.pop(connection.id, None)
        if tenant is not None and tenant.launcher == connection.id:
            tenant.launcher = None
            self.events.emit("tenant-lost", tenant=tenant.name, why=why)
        process = self._by_connection.pop(connection.id, None)
        if process is not None:
            self._process_disconnected(process, why)

    def on_turn(self) -> None:
        while (answer := self._holds.take()) is not None:
            who, held, why = answer
            self.holds_standing += held
            if who == _STRANGERS:
                self._strangers = "held" if held else ""
            elif who == _MOVES and self.moves is not None:
                self.moves.on_held(held, why)
            else:
                self.pool.on_held(held, why)
        now = self._clock()
        deadline = self.pool.deadline_ns()
        if deadline is not None and now >= deadline:
            self.pool.tick()
        if self.moves is not None:
            self.moves.tick(now)
        if now - self._scan_ns >= SCAN_NS:
            self._scan_ns = now
            self._every_second(now)

    def deadline_ns(self) -> int | None:
        times = [self._scan_ns + SCAN_NS, self.pool.deadline_ns()]
        if self.moves is not None:
            times.append(self.moves.deadline_ns())
        return min(time for time in times if time is not None)

    # Effects: what the pool makes happen ------------------------------------------------------------

    def hold(self) -> None:
        """Mostly online is busy, so offline is paused already and the gate answers in microseconds; then it
        is not worth two changes of thread."""
        if self.paused:
            try:
                self.gate.hold(QUICK_HOLD_S)
            except HoldTimeout:
                self._holds.ask(_POOL)
            else:
                self._holds.answer(_POOL, True, "")
        else:
            self._holds.ask(_POOL)

    def hold_for_moves(self) -> None:
        self._holds.ask(_MOVES)

    def release(self) -> None:
        self.holds_standing -= 1
        self.gate.release()

    def ledger(self, holder: Holder) -> LedgerCopy | None:
        return self.arenas.ledger(holder)

    def reclaim(self, holder: Holder, operation: int, mask: int) -> None:
        frame = wire.Reclaim(id=operation, at_ns=self._clock(), set=wire.Bitmap.from_int(mask))
        process = self.arenas.process_of(holder)
        if self.moves is not None:
            self.moves.reclaim(process, frame)
        else:
            self.send_to(process, frame)

    def discard(self, holder: Holder, mask: int) -> None:
        self.arenas.discard(holder, mask)

    def grant(self, holder: Holder, mask: int) -> None:
        process = self.arenas.process_of(holder)
        if self.moves is not None:
            self.moves.grant(process, mask)
            return
        self.send_to(process, wire.Grant(id=0, at_ns=self._clock(), set=wire.Bitmap.from_int(mask)))

    def kill(self, holder: Holder, why: str) -> None:
        self.kill_process(self.arenas.process_of(holder), why)

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None:
        self.events.emit(event, level=level, **fields)

    # Launchers and processes ------------------------------------------------------------------------

    def _on_tenant(self, connection: Connection, frame: wire.Tenant) -> None:
        peer = connection.peer
        if not self.identity.may_register(peer):
            raise IdentityError(
                RejectCode.EPERM,
                f"uid {peer.uid} may not register tenants with this agent (it runs as uid {os.getuid()}): "
                "run `valve run` as root or as the agent's user",
            )
        if frame.role not in (Role.ONLINE, Role.OFFLINE):
            raise wire.BadField(f"role {frame.role} is neither online nor offline")
        role = Role(frame.role)
        name = frame.name.decode("utf-8", "replace") or f"{role.name.lower()}-{peer.pid}"
        limit = self._limit_slabs(role, frame.memory_bytes)
        earlier = self.registry.launchers.get(peer.pid)
        if earlier is not None and earlier.role != role:
            raise IdentityError(
                RejectCode.EROLE,
                f"launcher {peer.pid} is already the {earlier.role.name.lower()} tenant {earlier.name}: "
                "start another `valve run` for the other role",
            )
        tenant, new = self.registry.register(name, role, limit, peer.pid, peer.pidfd, connection.id)
        if new:
            self.server.watch(tenant.launcher_pidfd, lambda: self._launcher_gone(tenant))
        connection.kind = Kind.LAUNCHER
        self._launchers[connection.id] = tenant
        self.events.emit(
            "tenant",
            tenant=name,
            id=tenant.id,
            role=role.name.lower(),
            pid=peer.pid,
            slabs=tenant.limit_slabs,
        )
        connection.send(wire.TenantOk(tenant=tenant.id, role=role))

    def _limit_slabs(self, role: Role, memory_bytes: int) -> int:
        if role == Role.ONLINE:
            return int(self.settings.slabs)
        wanted = memory_bytes or self.settings.offline_default_bytes
        return int(min(wanted // self.settings.slab_bytes, self.settings.slabs))

    def _launcher_gone(self, tenant: Tenant) -> None:
        self.server.unwatch(tenant.launcher_pidfd)
        self.registry.launcher_gone(tenant)
        self.events.emit("launcher-gone", tenant=tenant.name, pid=tenant.launcher_pid)

    def _on_hello(self, connection: Connection, hello: wire.Hello) -> None:
        main, pidfd = self.identity.main_of(connection.peer, hello)
        try:
            process = self._process(main, pidfd, hello)
        except BaseException:
            os.close(pidfd)
            raise
        tenant = process.tenant
        gpu_link.check_version(tenant.role, self.device, connection.version)
        helper = connection.peer.pid != main
        others = tuple(self.siblings.also_on(self, main)) if tenant.role == Role.ONLINE else ()
        page_fd, page = Page.create()
        if self.limits is not None and tenant.role == Role.OFFLINE:
            page.memory_limit_bytes = self.limits.first(tenant)
        # Under the gate before WELCOME: an offline process must be stoppable as soon as it is a tenant.
        try:
            if tenant.role == Role.ONLINE:
                self.gate.add_engine(connection.id, main, page_fd)
                for other in others:
                    other.add_guest(connection.id, process, page_fd)
            else:
                barrier = bool(hello.flags & wire.HelloFlag.BARRIER)
                self.gate.add_target(connection.id, main, process.pidfd, page_fd, barrier)
        except GateError as error:
            page.close()
            os.close(page_fd)
            if isinstance(error, GateDied):
                raise
            for other in others:
                other.remove_guest(connection.id)
            self._remove_from_gate(connection.id)
            raise IdentityError(
                RejectCode.EIDENTITY, f"process {main} cannot be controlled: {error}"
            ) from error
        process.link = Link(connection.id, page_fd, page, os.dup(connection.peer.pidfd) if helper else None)
        process.others = others
        process.helper_pid = connection.peer.pid if helper else None
        process.helper_cpu_s = None
        if helper:
            set_slice(connection.peer.pid, SLICE_NS)
        self._by_connection[connection.id] = process
        connection.kind = Kind.RUNTIME
        self.emit_for(process, "attach", role=tenant.role.name.lower(), helper=helper, comm=process.comm)
        doorbell_fd = self.siblings.common_doorbell_fd if others else self.gate.doorbell_fd
        fds = [page_fd, doorbell_fd] if tenant.role == Role.ONLINE else [page_fd]
        connection.send(
            wire.Welcome(
                role=tenant.role, device=self.device, tenant=tenant.id, slab_bytes=self.settings.slab_bytes,
                slabs_limit=min(tenant.limit_slabs, self.settings.arena_slabs),
                lease_ms=self.settings.lease_ns // 1_000_000,
            ),
            fds,
        )  # fmt: skip

    def _process(self, main: int, pidfd: int, hello: wire.Hello) -> Process:
        """The process that says HELLO, new or known, without a link; takes `pidfd` over unless it raises."""
        tenant = self.identity.tenant_of(main)
        if hello.role_claimed not in (Role.NONE, tenant.role):
            claimed = (
                Role(hello.role_claimed).name.lower() if hello.role_claimed in (1, 2) else hello.role_claimed
            )
            raise IdentityError(
                RejectCode.EROLE,
                f"process {main} says it is {claimed}, but its tenant {tenant.name} is "
                f"{tenant.role.name.lower()}: start it with the matching `valve run --workload`",
            )
        known = self.registry.processes.get(main)
        if known is not None:
            os.close(pidfd)  # `known.pidfd` is watched, so this is the same process
            if known.link is not None:
                self.server.drop(self.server.connections[known.link.connection], "it connected again")
            if hello.arena_slabs == 0 and known.memory is not None:
                self.arenas.release(known)  # it exec'ed: its address space, and the arena in it, are gone
            return known
        most = self.settings.offline_max_processes
        offline = sum(
            1 for process in self.registry.processes.values() if process.tenant.role == Role.OFFLINE
        )
        if tenant.role == Role.OFFLINE and offline >= most:
            raise IdentityError(
                RejectCode.EPERM,
                f"{offline} offline processes are attached already, the policy's most: end one, or raise "
                "spec.offline.maxProcesses",
            )
        process = Process(main, pidfd, tenant, hello.comm.decode("utf-8", "replace"))
        self.registry.processes[main] = process
        self.server.watch(pidfd, lambda: self._process_gone(process))
        return process

    def _process_disconnected(self, process: Process, why: str) -> None:
        """The connection is lost. If the process lives it keeps its slabs, and the gate keeps it paused."""
        link = process.link
        if link is None:
            return
        process.link = None
        process.lost_ns = self._clock()
        self.usage.engine_gone(link.connection, process.lost_ns)
        self._retire(process.tenant, link.page)
        link.page.close()
        os.close(link.page_fd)
        if link.helper_pidfd is not None:
            os.close(link.helper_pidfd)
        if process.memory is not None:
            self.pool.disconnected(process.memory.holder)
        self._remove_from_gate(link.connection)
        for other in process.others:
            other.remove_guest(link.connection)
        self.emit_for(process, "detach", why=why)

    def add_guest(self, connection: int, process: Process, page_fd: int) -> None:
        """An engine of another device's agent computes here too: it is busy for both. Raises GateError."""
        self.gate.add_engine(connection, process.pid, page_fd)
        self._guests[connection] = process

    def remove_guest(self, connection: int) -> None:
        if self._guests.pop(connection, None) is not None and not self.closing:
            self.usage.engine_gone(connection, self._clock())
            self._remove_from_gate(connection)

    def _remove_from_gate(self, connection: int) -> None:
        """Where the gate could not pause what it lost it tries again with every heartbeat."""
        try:
            self.gate.remove(connection)
        except GateRefused as error:
            self.events.emit("uncontrollable", level="error", why=str(error))

    def _process_gone(self, process: Process) -> None:
        """It is dead: its memory returns to the machine, then its slabs to the pool."""
        self.server.unwatch(process.pidfd)
        if process.link is not None:
            if process.link.helper_pidfd is not None:
                _kill(process.link.helper_pidfd)
            self.server.drop(self.server.connections[process.link.connection], "its process is gone")
        self.arenas.release(process)
        self.registry.process_gone(process)
        os.close(process.pidfd)
        self.emit_for(process, "gone")

    def _forget(self, process: Process) -> None:
        self.server.unwatch(process.pidfd)
        self.registry.process_gone(process)
        os.close(process.pidfd)

    # Time and the gate ------------------------------------------------------------------------------

    def _every_second(self, now: int) -> None:
        for process in list(self.registry.processes.values()):
            if process.link is None and process.memory is None and now - process.lost_ns > SCAN_NS:
                # It became a program without libvalve: if it is offline the scan finds it from now on.
                self._forget(process)
        if self._scan.update(self.registry) or self._unscanned:
            before, self._unscanned = self._unscanned, ""
            try:
                self.gate.set_scanned(self._scan.found)
            except GateRefused as error:
                self._unscanned = str(error)
                if self._unscanned != before:
                    self.events.emit("uncontrollable", level="error", why=self._unscanned)
        for process in list(self.registry.processes.values()):
            self._watch(process, now)
        if self.limits is not None:
            try:
                self.limits.look()
            except DeviceError as error:
                self.events.emit("unjudged", level="error", why=str(error))
        if self.moves is not None and now >= self.started_ns + self.settings.recovery_grace_ns:
            self.moves.every_second()  # not before those who hold memory have come back
        self.on_second()

    def _watch(self, process: Process, now: int) -> None:
        resident = self.memory.resident_bytes(process.memory.arena) if process.memory else 0
        fault = watchdog.fault_of_memory(process, resident, self.settings.slab_bytes, now)
        fault = fault or watchdog.fault_of_helper(process)
        if fault is None:
            return
        if process.tenant.role == Role.ONLINE:  # it never dies of Valve (P5)
            self.emit_for(process, "overuse", level="warning", why=fault)
        else:
            self.kill_process(process, fault)

    def _on_gate(self) -> None:
        try:
            happened = self.gate.read_events()
        except GateDied as error:
            raise AgentFailed(str(error)) from error
        for event in happened:
            self.usage.on_event(event)
            name = str(event.pop("event"))
            conn = event.pop("conn", None)
            process = self._by_connection.get(conn) or self._guests.get(conn) if conn is not None else None
            if process is not None:
                event["tenant"] = process.tenant.name
            if name in ("pause", "resume"):
                self.paused = name == "pause"
            elif name == "route":
                self._on_route(event)
            quiet = name in ("busy", "idle", "missed_busy", "pause", "resume", "target_gone")
            level = "debug" if quiet else "info" if name == "route" else "warning"
            self.events.emit(name, level=level, **event)

    def _on_route(self, event: dict[str, Any]) -> None:
        process = self.registry.processes.get(event["pid"])
        if process is not None:
            process.route = {key: value for key, value in event.items() if key not in ("pid", "t_ns")}
            event["tenant"] = process.tenant.name

    def _retire(self, tenant: Tenant, page: Page) -> None:
        """Keep the counters of a page that goes away, so that metrics never fall."""
        kept = self.retired.setdefault(tenant.name, dict.fromkeys(COUNTERS, 0))
        for name in COUNTERS:
            kept[name] += getattr(page, name)

    # What gpu_watch.py needs -------------------------------------------------------------------------

    def process(self, pid: int) -> Process | None:
        return self.registry.processes.get(pid)

    def offline_strays(self) -> Iterable[int]:
        return self._scan.found

    def role_of(self, pid: int) -> tuple[Role, bool]:
        return self.siblings.role_of(self, pid)

    def ours(self) -> Iterable[int]:
        return (os.getpid(), self.gate.pid)

    def judge(self, watch: GpuWatch) -> None:
        """Who computes on the GPU without being under the gate? Kill or report it."""
        try:
            findings = watch.look(self)
        except DeviceError as error:
            self.events.emit("watch-failed", level="error", why=str(error))
            return
        for finding in findings:
            self.events.emit(
                finding.event, level="error", pid=finding.pid, why=finding.why, killed=finding.kill
            )
            if finding.kill:
                _kill_number(finding.pid)
        if watch.refuses and not self._strangers:
            self._strangers = "asked"
            self._holds.ask(_STRANGERS)
        elif not watch.refuses and self._strangers == "held":
            self._strangers = ""
            self.release()

    # What slab_moves.py and arenas.py need -----------------------------------------------------------

    def arena_limit(self, process: Process) -> int:
        return int(min(process.tenant.limit_slabs, self.settings.arena_slabs))

    def returned(self, holder: Holder, mask: int) -> None:
        self.pool.on_return(holder, mask)

    def send_to(self, process: Process, frame: wire.Frame) -> None:
        if process.link is not None:
            self.server.connections[process.link.connection].send(frame)

    def kill_process(self, process: Process, why: str) -> None:
        self.emit_for(process, "kill", level="error", why=why)
        _kill(process.pidfd)
        if process.link is not None and process.link.helper_pidfd is not None:
            _kill(process.link.helper_pidfd)

    def now_ns(self) -> int:
        return self._clock()

    def emit_for(self, process: Process, event: str, *, level: str = "info", **fields: object) -> None:
        self.events.emit(event, level=level, tenant=process.tenant.name, pid=process.pid, **fields)


def _kill_number(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # gone by itself; before Linux 6.16 EINVAL may say so too
        return
    _kill(pidfd)
    os.close(pidfd)


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return  # it is dead already, which is what was wanted
