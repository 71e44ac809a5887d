# SPDX-License-Identifier: Apache-2.0
"""Which route can control channels on this machine, and why: found out by calls that change nothing.

Why it exists: a driver may be unknown, a sandbox may refuse a control, a privilege may be missing. The agent
asks once at its start; `valve doctor` and the qualification ask the same questions and show the answers.

The question for `agent` and `patched` is asked as it will be in earnest: another process (a child, for a
moment) owns an RM client, and we issue FIFO_DISABLE_CHANNELS with an empty list on it, once through the file
that the child passes and once through a file of our own.

Threading model: `choose` forks, so it must be called before threads are started. Callers: parts.py, doctor,
qualification.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.routes import AGENT, IN_PROCESS, LAUNCH_GATE, PATCHED

AUTO = "auto"
ORDER = (AGENT, PATCHED, IN_PROCESS, LAUNCH_GATE)
"""Best first; `auto` takes all that work, in this order."""
ROUTE_FIELD = "spec.compute.route"


class NoRoute(DeviceError):
    """The policy allows no route that works here."""


@dataclass(frozen=True)
class Verdict:
    route: str
    works: bool
    why: str


@dataclass(frozen=True)
class Choice:
    """`allowed`: what the gate may use, best first; `verdicts`: every route that was looked at."""

    driver: str
    branch: str | None
    allowed: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    commit: str = "none"

    @property
    def route(self) -> str:
        return self.allowed[0]

    @property
    def why(self) -> str:
        return next(verdict.why for verdict in self.verdicts if verdict.route == self.route)

    def gate_device(self) -> str:
        """For gate_main."""
        return f"nvidia:{','.join(self.allowed)}/{self.commit}"

    def document(self) -> dict[str, Any]:
        """JSON-ready, for status, log and doctor."""
        return {
            "route": self.route,
            "why": self.why,
            "allowed": list(self.allowed),
            "commit": self.commit,
            "driver": self.driver,
            "branch": self.branch,
            "refused": {v.route: v.why for v in self.verdicts if not v.works},
        }


def choose(wanted: str = AUTO, commit: str = "none") -> Choice:
    """Probe this machine and choose. `wanted`: a route's name, or auto. Raises NoRoute, DeviceError."""
    version = rm.driver_version()
    if version is None:
        raise DeviceError(
            f"{rm.VERSION_PATH} does not exist: the NVIDIA driver is not loaded. Install it or run "
            "`modprobe nvidia`; `valve doctor` says what is missing"
        )
    branch = rm.branch_of(version)
    verdicts = tuple(probe(version))
    works = [verdict.route for verdict in verdicts if verdict.works]
    allowed = tuple(route for route in works if wanted in (AUTO, route))
    if not allowed and wanted != AUTO:
        why = next(verdict.why for verdict in verdicts if verdict.route == wanted)
        raise NoRoute(
            f"{ROUTE_FIELD} is {wanted}, which does not work here: {why}. "
            "Set it to auto, or ask `valve doctor`"
        )
    if not allowed:
        why = "; ".join(f"{verdict.route}: {verdict.why}" for verdict in verdicts)
        raise NoRoute(f"no route works here: {why}")
    return Choice(version, branch.name if branch else None, allowed, verdicts, commit)


def probe(version: str) -> Sequence[Verdict]:
    """A verdict for every route, best first. Leaves nothing behind. Raises DeviceError where not even the
    control file can be opened."""
    if rm.branch_of(version) is None:
        known = ", ".join(rm.BRANCHES)
        why = f"Valve knows the layouts of driver branches {known}, not of {version}: update Valve"
        return [Verdict(route, False, why) for route in ORDER[:-1]] + [_launch_gate()]
    passed, own, alone = _ask()
    found = {
        AGENT: Verdict(AGENT, passed == rm.OK, _say(passed, "on the file that another process passed")),
        IN_PROCESS: Verdict(IN_PROCESS, alone == rm.OK, _say(alone, "on a client of the same process")),
        PATCHED: Verdict(
            PATCHED, own == rm.OK, _say(own, "on another process's client through a file of ours")
        ),
        LAUNCH_GATE: _launch_gate(),
    }
    return [found[route] for route in ORDER]


def _launch_gate() -> Verdict:
    return Verdict(
        LAUNCH_GATE, True, "launches can be held in any process; what was launched runs to its end"
    )


def _say(status: int, where: str) -> str:
    if status == rm.OK:
        return f"the driver lets channels be disabled {where}"
    return f"the driver refuses {where}, status {rm.describe(status)}"


def _ask() -> tuple[int, int, int]:
    """Statuses of an empty FIFO_DISABLE_CHANNELS: on a client of a child through its file, through our own
    file, and on a client of ours."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()  # so that we see the parent hang up
        os._exit(_be_a_tenant(theirs))
    theirs.close()
    try:
        with ours:
            data, fds, _, _ = socket.recv_fds(ours, 64, 1)
            if not fds:
                raise DeviceError(f"the probe's own client could not be made: {data.decode() or 'no answer'}")
            client, subdevice = (int(word) for word in data.split())
            try:
                block = [_empty(client, subdevice)]
                passed = block[0].issue(fds[0])
                with rm.RmClient() as mine:
                    own = block[0].issue(mine.fd)
                    alone = _empty(mine.handle, _subdevice(mine)).issue(mine.fd)
            finally:
                os.close(fds[0])
    finally:
        os.waitpid(child, 0)
    return passed, own, alone


def _empty(client: int, subdevice: int) -> rm.Control:
    return rm.Control(client, subdevice, rm.FIFO_DISABLE_CHANNELS, rm.DisableChannels(disable=1, count=0))


def _subdevice(client: rm.RmClient) -> int:
    device = client.alloc(client.handle, rm.DEVICE, bytes(56))
    return client.alloc(device, rm.SUBDEVICE, bytes(4))


def _be_a_tenant(link: socket.socket) -> int:
    """In the child: own a client until the parent hangs up."""
    try:
        client = rm.RmClient()
        words = f"{client.handle} {_subdevice(client)}"
        socket.send_fds(link, [words.encode()], [client.fd])
    except (DeviceError, OSError) as error:
        link.send(str(error).encode()[:1024])
        return 1
    link.recv(1)
    return 0
