# SPDX-License-Identifier: Apache-2.0
"""The ways to stop and resume one process's GPU work, weakest last.

    agent        the agent disables the channels, on the control file that the process passed: stock driver
    patched      the agent does it on a file of its own: the driver must carry Valve's one-line patch
    in-process   libvalve's control loop does the same at the agent's command
    launch-gate  libvalve holds kernel and graph launches; what was launched runs to its end

Why it exists: which one works depends on driver, sandbox and privileges, and is decided by a harmless probe
(enabling channels that are enabled). A route says why it did not work in a sentence for the operator.

Threading model: the gate's thread. Callers: compute.py. Standard library only.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from typing import ClassVar, Protocol

from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.plan import Commit, NotYet, Plan, Step, build
from valve_agent.devices.nvidia.table import GpuTable

AGENT, IN_PROCESS, PATCHED, LAUNCH_GATE = "agent", "in-process", "patched", "launch-gate"
NUMBERS = {AGENT: 1, IN_PROCESS: 2, PATCHED: 3, LAUNCH_GATE: 4}
"""As valve_protocol.h has them."""
ATTEMPTS = 4
"""How often a stop is tried anew because the process changed its channels meanwhile."""
ANSWER_TIMEOUT_S = 0.02
DRAIN_WAIT_S = 0.002
"""How long one attempt of launch-gate waits; the gate tries again."""
POLL_S = 20e-6
STOP_COMPUTE, STOP_ALL, RUN = 1, 2, 3

_clock = time.monotonic
_sleep = time.sleep


class GpuProcess:
    """What one process does on the GPU, and how far it is prepared. Owns its view and descriptors."""

    __slots__ = ("bell_fd", "command", "files", "plan", "table")

    def __init__(self, table: GpuTable, bell_fd: int) -> None:
        self.table = table
        self.bell_fd = bell_fd
        self.files: dict[int, int] = {}
        """number -> control file that the process passed"""
        self.plan: Plan | None = None
        self.command = table.command >> 2
        """sequence number of the last command to its control loop"""


class Route(Protocol):
    """`stop` and `run` return None, or why it is not so (NotYet: now)."""

    name: ClassVar[str]

    def stop(self, process: GpuProcess, everything: bool) -> str | None:
        """Returns None only when the channels (compute, or all of them) execute nothing."""
        ...

    def run(self, process: GpuProcess) -> str | None:
        """Every channel may execute again. Harmless while they may: so this is the probe."""
        ...

    def prepare(self, process: GpuProcess) -> Plan | None:
        """Make ready what `stop` will need."""
        ...


class ChannelRoute:
    """agent and patched: prepared ioctls from this process."""

    name: ClassVar[str] = AGENT

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._own_fd: int | None = None

    def prepare(self, process: GpuProcess) -> Plan:
        plan = process.plan
        if plan is None or plan.changes != process.table.changes:
            plan = process.plan = build(process.table, process.files, self._own_fd, self._commit)
        return plan

    def stop(self, process: GpuProcess, everything: bool) -> str | None:
        why: str | None = None
        for _ in range(ATTEMPTS):
            plan = self.prepare(process)
            status = _issue(plan.stop_compute)
            if everything and not status:
                status = _issue(plan.stop_rest)
            if status in rm.STALE:
                why = NotYet(f"its channels changed while they were disabled ({rm.describe(status)})")
                process.plan = None
                continue
            if status:
                return _refused(self.name, status)
            if plan.changes == process.table.changes:
                return plan.problem
            why = NotYet("it makes and frees channels faster than they can be disabled")
        return why

    def run(self, process: GpuProcess) -> str | None:
        status = rm.OK
        for _ in range(ATTEMPTS):
            plan = self.prepare(process)
            status = _issue(plan.run)
            if status not in rm.STALE:
                return _refused(self.name, status) if status else plan.problem
            process.plan = None
        return NotYet(_refused(self.name, status))


class PatchedRoute(ChannelRoute):
    name: ClassVar[str] = PATCHED

    def __init__(self, commit: Commit) -> None:
        """Raises DeviceError where there is no driver."""
        super().__init__(commit)
        client = rm.RmClient()  # a client of ours makes this file one that the driver knows as ours
        self._own_fd = os.dup(client.fd)
        client.close()


class InProcessRoute:
    """libvalve's control loop issues the calls; we wait for its answer."""

    name: ClassVar[str] = IN_PROCESS

    def prepare(self, process: GpuProcess) -> None:
        return None

    def stop(self, process: GpuProcess, everything: bool) -> str | None:
        return self._order(process, STOP_ALL if everything else STOP_COMPUTE)

    def run(self, process: GpuProcess) -> str | None:
        return self._order(process, RUN)

    def _order(self, process: GpuProcess, verb: int) -> str | None:
        table = process.table
        table.route = NUMBERS[self.name]
        for _ in range(ATTEMPTS):
            changes = table.changes
            process.command += 1
            command = process.command << 2 | verb
            table.order(command)
            os.eventfd_write(process.bell_fd, 1)
            until = _clock() + ANSWER_TIMEOUT_S
            while table.answered != command:
                if _clock() > until:
                    return NotYet("its libvalve does not answer: the helper process is stopped or hung")
                _sleep(POLL_S)
            status = table.answer
            if status in rm.STALE:
                continue
            if status:
                return _refused(self.name, status)
            if table.overflow:
                return "its channels are not all known: use fewer streams and contexts in one process"
            if changes == table.changes or verb == RUN:
                return None
        return NotYet("it makes and frees channels faster than they can be disabled")


class LaunchGateRoute:
    """Launches and copies wait in the process; the pause is over when a thread of libvalve has seen that all
    that was launched before has ended. No channel is touched, so it works where nothing else does."""

    name: ClassVar[str] = LAUNCH_GATE

    def prepare(self, process: GpuProcess) -> None:
        return None

    def stop(self, process: GpuProcess, everything: bool) -> str | None:
        table = process.table
        if table.overflow:
            return "its channels are not all known: use fewer streams and contexts in one process"
        if table.launch_hooks == 0:
            return None  # it has launched nothing yet, and its first launch will wait
        # an answered STOP_ALL of route in-process is no answer to this one
        ordered = table.route == NUMBERS[self.name] and table.command & 3 == STOP_ALL
        table.route = NUMBERS[self.name]
        if not ordered:
            process.command += 1
            table.order(process.command << 2 | STOP_ALL)
            table.wake_command()
        until = _clock() + DRAIN_WAIT_S
        while table.answered != table.command:
            if _clock() > until:
                return "what it launched before the pause still runs (route launch-gate waits for its end)"
            _sleep(POLL_S)
        return None

    def run(self, process: GpuProcess) -> str | None:
        process.table.route = NUMBERS[self.name]
        process.command += 1
        process.table.order(process.command << 2 | RUN)
        process.table.wake_command()
        return None


def _issue(steps: Sequence[Step]) -> int:
    """The first status that is not OK; above 0x10000 an error number of the ioctl itself. A GPU that is gone
    executes nothing: that counts as done."""
    for fd, block in steps:
        try:
            status = block.issue(fd)
        except OSError as error:
            return 0x10000 + (error.errno or 0)
        if status and status != rm.GPU_IS_LOST:
            return status
    return rm.OK


def _refused(route: str, status: int) -> str:
    if status >= 0x10000:
        text = os.strerror(status - 0x10000)
        if status - 0x10000 == errno.EIO:
            text += "; the GPU may have fallen off the bus, see `dmesg`"
        return f"route {route}: the driver's file takes no call ({text})"
    hint = {
        rm.INVALID_CLIENT: "the file that arrived is not the one that made the client",
        rm.INSUFFICIENT_PERMISSIONS: "run the agent as root, or choose another route",
        rm.NOT_SUPPORTED: "a sandbox or this driver refuses it; `valve doctor` says which route works",
        rm.TIMEOUT: "the GPU's firmware does not answer; see `dmesg` for an Xid",
    }.get(status, "`valve doctor` says which route works")
    return f"route {route}: the driver refuses to disable channels, status {rm.describe(status)}; {hint}"
