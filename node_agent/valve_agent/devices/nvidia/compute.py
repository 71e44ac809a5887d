# SPDX-License-Identifier: Apache-2.0
"""Compute control on an NVIDIA GPU: the channels of offline processes, disabled and enabled.

Why it exists: `pause` must return only when no kernel of any target executes, and in the common case cost one
ioctl per process, with blocks made beforehand (`tend`).

Order in a pause: first every target's `hold` word, so that nothing more is launched or made, then the
channels. The driver may hold its lock for long (another process's allocation): then this thread waits with
it, as nobody else could act either; the hold is in force meanwhile.

A process without GPU work has nothing to pause. A target that its route cannot stop falls back along the
allowed routes; if none is left it is reported by PauseTimeout, and the gate ends it (P6).

Closing the last descriptor of a control file frees its client in the closing thread, which may take the
driver long: driver files are closed by a thread of their own.

Threading model: the gate's only thread, but for those closes. Caller: gate.py. Standard library only.
"""

from __future__ import annotations

import _thread
import os
import signal
import time
from collections.abc import Iterable, Sequence

from valve_agent.devices.base import PauseTimeout, TargetRefused
from valve_agent.devices.nvidia import routes
from valve_agent.devices.nvidia.plan import Commit, NotYet, build
from valve_agent.devices.nvidia.routes import GpuProcess, Route
from valve_agent.devices.nvidia.table import FILES_MAX, HOLD_CHANNELS, HOLD_LAUNCHES, GpuTable
from valve_agent.pidfds import has_ended

HOLD_ALL = HOLD_CHANNELS | HOLD_LAUNCHES
RUNNING, COMPUTE_OFF, ALL_OFF = 0, 1, 2
SLOW_NS = 20_000_000

_send = signal.pidfd_send_signal
_clock = time.monotonic_ns


class GpuTarget:
    """One offline process. `gpu` is None until its libvalve has sent the table."""

    __slots__ = (
        "asleep",
        "gone",
        "gpu",
        "level",
        "pid",
        "pidfd",
        "proven",
        "route",
        "stopped",
        "wanted",
        "why",
    )

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.gone = False
        self.gpu: GpuProcess | None = None
        self.asleep = True
        """it may have stopped itself when it lost an agent"""
        self.level = RUNNING
        self.wanted = RUNNING
        self.stopped = -1
        """the table's `changes` when `level` was reached"""
        self.proven = -1
        """and when the route was last seen to work; -1: the best one is worth another try"""
        self.route = 0
        """index into the allowed routes"""
        self.why = ""
        """why not an earlier one"""

    @property
    def is_settled(self) -> bool:
        return self.gpu is not None and self.stopped == self.gpu.table.changes


class NvidiaCompute:
    """ComputeControl of an NVIDIA GPU."""

    def __init__(self, allowed: Sequence[Route]) -> None:
        """`allowed`: best first."""
        self._allowed = list(allowed)
        self._notes: list[tuple[str, dict[str, object]]] = []
        self._ours = {os.getpid(), os.getppid()}

    # -- targets ---------------------------------------------------------------------------

    def open(self, pid: int, pidfd: int, barrier: bool) -> GpuTarget:
        """See ComputeControl.open. `barrier` means nothing here."""
        if pid in self._ours:
            raise TargetRefused(f"process {pid} is the agent itself: it is never paused")
        try:
            _send(pidfd, 0)
        except OSError as error:
            raise TargetRefused(
                f"process {pid} cannot be paused: {error.strerror}. The agent must run as root or as the "
                "user of every offline process"
            ) from error
        return GpuTarget(pid, pidfd)

    def close(self, target: GpuTarget) -> None:
        gpu, target.gpu = target.gpu, None
        if gpu is not None:
            if target.gone or self.is_gone(target):
                _stop_last(gpu)
            _close_elsewhere(gpu.files.values())
            os.close(gpu.bell_fd)
            gpu.table.close()
        os.close(target.pidfd)

    def supply(self, target: GpuTarget, number: int, fds: Sequence[int]) -> None:
        """See ComputeControl.supply. `number` -1: the channel table and the bell; else a control file."""
        if number < 0:
            self._supply_table(target, fds)
            return
        gpu = target.gpu
        if gpu is None or number >= FILES_MAX:
            raise TargetRefused(
                f"process {target.pid} sent a driver file before its table, or a wrong number"
            )
        if number in gpu.files:
            _close_elsewhere([gpu.files[number]])
        gpu.files[number] = fds[0]
        gpu.plan = None
        target.proven = -1
        gpu.table.take(number)

    def withdraw(self, target: GpuTarget, number: int) -> None:
        """See ComputeControl.withdraw: else the file's client and its memory would live on."""
        gpu = target.gpu
        fd = gpu.files.pop(number, None) if gpu is not None else None
        if gpu is not None and fd is not None:
            gpu.plan = None
            gpu.table.leave(number)
            _close_elsewhere([fd])

    def _supply_table(self, target: GpuTarget, fds: Sequence[int]) -> None:
        table = GpuTable(fds[0])
        table.hold = HOLD_ALL  # until the gate says that it may run
        os.close(fds[0])
        before, target.gpu = target.gpu, GpuProcess(table, fds[1])
        target.proven = target.stopped = -1
        target.level = RUNNING
        if before is not None:
            _close_elsewhere(before.files.values())
            os.close(before.bell_fd)
            before.table.close()

    # -- ComputeControl --------------------------------------------------------------------

    def pause(self, targets: Sequence[GpuTarget]) -> None:
        self._stop(targets, COMPUTE_OFF)

    def quiesce(self, targets: Sequence[GpuTarget]) -> None:
        """Copy engines and everything else, too: before anybody touches the targets' memory."""
        self._stop(targets, ALL_OFF)

    def resume(self, targets: Sequence[GpuTarget]) -> None:
        for target in targets:
            if target.gone:
                continue
            target.level, target.wanted, target.stopped = RUNNING, RUNNING, -1
            if target.gpu is not None and not self._let_run(target, target.gpu):
                continue  # it stays held; `tend` tries again
            self._wake(target)

    def is_gone(self, target: GpuTarget) -> bool:
        return has_ended(target.pidfd)

    def running(self, targets: Sequence[GpuTarget]) -> Sequence[GpuTarget]:
        """Those that are less off than they should be. Whose channels have changed since is stopped again
        first: that alone is no offence."""
        suspects = []
        for target in targets:
            gpu = target.gpu
            if gpu is None or target.gone or target.wanted == RUNNING:
                continue
            gpu.table.hold = HOLD_ALL
            settled = target.level >= target.wanted and target.is_settled
            if not settled and self._stop_one(target, gpu, target.wanted) is not None:
                suspects.append(target)
        return suspects

    def tend(self, targets: Sequence[GpuTarget]) -> Sequence[tuple[GpuTarget, str]]:
        """See ComputeControl.tend: blocks for channels that are new, and proof that the route works."""
        failed = []
        for target in targets:
            gpu = target.gpu
            if gpu is None or target.gone or target.level != RUNNING:
                continue
            if target.proven == gpu.table.changes and not gpu.table.hold:
                continue
            if not self._let_run(target, gpu):
                failed.append((target, target.why))
        return failed

    def notes(self) -> Sequence[tuple[str, dict[str, object]]]:
        """What happened since the last call: (event, fields)."""
        notes, self._notes = self._notes, []
        return notes

    # -- inside ----------------------------------------------------------------------------

    def _stop(self, targets: Sequence[GpuTarget], level: int) -> None:
        started = _clock()
        for target in targets:
            target.wanted = max(level, target.wanted)
            if target.gpu is not None:
                target.gpu.table.hold = HOLD_ALL
        refused: dict[int, str] = {}
        for target in targets:
            gpu = target.gpu
            if gpu is None or target.gone or (target.level >= level and target.is_settled):
                continue
            why = self._stop_one(target, gpu, target.wanted)
            if why is None:
                continue
            target.gone = self.is_gone(target)
            if not target.gone:
                refused[target.pid] = why
        took = _clock() - started
        if refused:
            raise PauseTimeout(list(refused), took / 1e3, refused)
        if took > SLOW_NS:
            self._note("slow_driver", took_ms=took / 1e6, pids=[target.pid for target in targets])

    def _stop_one(self, target: GpuTarget, gpu: GpuProcess, level: int) -> str | None:
        """By the target's route or the next that works; returns why none does."""
        why = None
        refused: list[Route] = []
        passes = False
        for index in range(target.route, len(self._allowed)):
            changes = gpu.table.changes
            if self._allowed[index].name == routes.LAUNCH_GATE:
                for route in refused:
                    route.run(gpu)  # what it disabled in part must come to its end
            why = self._allowed[index].stop(gpu, level == ALL_OFF)
            if why is None:
                target.level, target.stopped = level, changes
                if target.asleep and self._allowed[index].name != routes.LAUNCH_GATE:
                    self._wake(target)  # its channels are off: the processor may have it
                if index != target.route:
                    target.route = index
                    if passes:
                        target.proven = -1
                    self._report(target, gpu)
                return None
            target.why = why
            if isinstance(why, NotYet):
                passes = True
            else:
                refused.append(self._allowed[index])
        return why

    def _wake(self, target: GpuTarget) -> None:
        try:
            _send(target.pidfd, signal.SIGCONT)
        except ProcessLookupError:
            target.gone = True
        except PermissionError:
            return  # it runs as another user now: no agent but root's could have stopped it
        target.asleep = False

    def _let_run(self, target: GpuTarget, gpu: GpuProcess) -> bool:
        """Enable its channels, which also proves the route, and let go what waits in the process. The best
        route is tried anew where something has changed, or it failed for a moment only."""
        changes = gpu.table.changes
        passes = False
        for index in range(0 if target.proven < 0 else target.route, len(self._allowed)):
            why = self._allowed[index].run(gpu)
            if why is None:
                break
            target.why = why
            passes = passes or isinstance(why, NotYet)
        else:
            return False
        if gpu.table.hold:
            gpu.table.hold = 0
            gpu.table.wake()
        if changes and (index != target.route or (target.proven < 0 and not passes)):
            target.route = index
            self._report(target, gpu)
        target.proven = changes if changes and not passes else -1
        return True

    def _report(self, target: GpuTarget, gpu: GpuProcess) -> None:
        route = self._allowed[target.route].name
        gpu.table.route = routes.NUMBERS[route]
        plan = gpu.plan or build(gpu.table, gpu.files, None, Commit.NONE)
        self._note(
            "route",
            pid=target.pid,
            route=route,
            why=str(target.why) or "enabling its channels through it worked",
            channels=plan.channels,
            copy_channels=plan.copies,
            clients=plan.clients,
        )

    def _note(self, event: str, **fields: object) -> None:
        self._notes.append((event, fields))


def _stop_last(gpu: GpuProcess) -> None:
    """Of a dead process: its children may hold its files too, and its kernels would go on."""
    plan = build(gpu.table, gpu.files, None, Commit.NONE)
    for fd, block in [*plan.stop_compute, *plan.stop_rest]:
        try:
            block.issue(fd)
        except OSError:
            return  # the file is gone, and all on it


def _close_elsewhere(fds: Iterable[int]) -> None:
    def close(doomed: list[int]) -> None:
        for fd in doomed:
            os.close(fd)

    if doomed := list(fds):
        try:
            # threading.Thread.start would wait until the thread has had its turn on the CPU
            _thread.start_new_thread(close, (doomed,))
        except RuntimeError:  # no thread is to be had
            close(doomed)


def parse(text: str) -> NvidiaCompute:
    """'agent,in-process/none': allowed routes, best first, and the commit step; see probe.gate_device."""
    names, _, commit = text.partition("/")
    step = Commit(commit or "none")
    made: list[Route] = []
    for name in names.split(","):
        if name == routes.AGENT:
            made.append(routes.ChannelRoute(step))
        elif name == routes.PATCHED:
            made.append(routes.PatchedRoute(step))
        elif name == routes.IN_PROCESS:
            made.append(routes.InProcessRoute())
        elif name == routes.LAUNCH_GATE:
            made.append(routes.LaunchGateRoute())
    return NvidiaCompute(made)
