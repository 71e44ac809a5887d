# SPDX-License-Identifier: Apache-2.0
"""E7 and E15: who may control whose channels, and what each control answers on this machine.

Threading model: the part's main thread. Called by qualify.py.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter

from qualification.machine import Machine, Tools
from qualification.processes import Actor, Watch
from qualification.record import Found, Skip
from qualification.rig import Rig, stop_process
from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.table import Channel

_PIDFD_GETFD = 438
NOBODY = 65_534
_libc = ctypes.CDLL(None, use_errno=True)


def driver_files(pid: int, path: str) -> list[int]:
    """Duplicates of a process's descriptors of a driver file, taken by pidfd_getfd. Raises OSError."""
    found = []
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{name}") != path:
                continue
            fd = _libc.syscall(_PIDFD_GETFD, pidfd, int(name), 0)
            if fd < 0:
                code = ctypes.get_errno()
                raise OSError(code, f"pidfd_getfd: {os.strerror(code)}")
            found.append(fd)
    finally:
        os.close(pidfd)
    return found


def e7(machine: Machine, tools: Tools, count: int) -> Found:
    """The same control from other processes: by a passed file, by pidfd_getfd, by an own file."""
    if os.geteuid() != 0:
        raise Skip("e7 compares root with another user: run as root")
    figures: dict[str, object] = {}
    with Rig(machine, tools) as rig:
        victim, watch = rig.offline(), rig.watch(observed=False)
        rig.run_timer(victim, watch)
        first = next(channel for channel in rig.channels(victim) if channel.computes)
        handles = [channel.channel for channel in rig.channels(victim) if channel.computes]
        passed = rig.control_file(victim, first)

        figures["passed file, root"] = _attempt(watch, passed, first, handles)
        stranger = rig.bare(cuda=False)
        figures["passed file, another user"] = _as_nobody(stranger, watch, passed, first, handles)
        figures["RESTART_RUNLIST, another user"] = _restart_as_nobody(stranger, first)
        try:
            taken = driver_files(victim.pid, rm.CTL_PATH)
            figures["files found by pidfd_getfd"] = len(taken)
            right = [fd for fd in taken if _status(fd, first, rm.TSG_GET_INFO, first.group, 4) == rm.OK]
            figures["of them the client's"] = len(right)
            figures["pidfd_getfd, root"] = _attempt(watch, right[0], first, handles) if right else "none fits"
            for fd in taken:
                os.close(fd)
        except OSError as error:
            figures["pidfd_getfd, root"] = str(error)
        with rm.RmClient() as own:
            figures["own file, root"] = _attempt(watch, own.fd, first, handles)
        stop_process(victim)
        figures["passed file, victim stopped by SIGSTOP"] = _attempt(watch, passed, first, handles)
    good = {"status": "0x00", "evicted": True, "went on": True}
    names = ("passed file, root", "passed file, another user", "passed file, victim stopped by SIGSTOP")
    bad = [name for name in names if figures[name] != good]
    if bad:
        return Found("fail", f"route `agent` does not hold: {', '.join(bad)}", figures)
    own_status = str(dict(figures["own file, root"])["status"])  # type: ignore[call-overload]
    return Found("pass", f"a passed file controls from anywhere; an own file gets {own_status}", figures)


def _attempt(watch: Watch, fd: int, first: Channel, handles: list[int]) -> dict[str, object]:
    status = _disable(fd, first, handles, True)
    evicted = watch.stands()
    if status == rm.OK:
        _disable(fd, first, handles, False)
    return {"status": f"0x{status:02x}", "evicted": evicted, "went on": watch.advances()}


def _disable(fd: int, first: Channel, handles: list[int], disable: bool) -> int:
    status = rm.OK
    for block in rm.disable_blocks(first.client, first.subdevice, handles, disable):
        status = status or block.issue(fd)
    return status


def _status(fd: int, channel: Channel, command: int, handle: int, size: int) -> int:
    try:
        rm.RmClient(fd, channel.client).control(handle, command, bytes(size))
    except rm.RmError as error:
        return error.status
    return rm.OK


def _as_nobody(actor: Actor, watch: Watch, fd: int, first: Channel, handles: list[int]) -> dict[str, object]:
    actor.run(
        f"""
        import os
        from valve_agent.devices.nvidia import rm
        os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
        fd = fds[0]
        def disable(on):
            blocks = rm.disable_blocks({first.client}, {first.subdevice}, {handles}, on)
            return [block.issue(fd) for block in blocks]
        """,
        (fd,),
    )
    status = max(actor.run("result = disable(True)"))
    evicted = watch.stands()
    actor.run("disable(False)")
    return {"status": f"0x{status:02x}", "evicted": evicted, "went on": watch.advances()}


def _restart_as_nobody(actor: Actor, first: Channel) -> str:
    status = actor.run(f"result = rm.restart_block({first.client}, {first.channel}).issue(fd)")
    return rm.describe(status)


def e15(machine: Machine, tools: Tools, count: int) -> Found:
    """Status of every control that Valve might use, on a victim's own objects, in its harmless form."""
    answers: dict[str, str] = {}
    with Rig(machine, tools) as rig:
        calls = rig.traced()
        tools.clock.keep({"calls of libcuda": calls})
        victim = rig.offline()
        captured = Counter(f"engine {channel.engine}" for channel in rig.channels(victim))
        channel = next(channel for channel in rig.channels(victim) if channel.computes)
        fd = rig.control_file(victim, channel)
        client = rm.RmClient(fd, channel.client)
        enable = bytes([1]) + bytes(machine.branch.schedule_params - 1)
        for name, handle, command, params in (
            ("FIFO_DISABLE_CHANNELS (none)", channel.subdevice, rm.FIFO_DISABLE_CHANNELS, bytes(536)),
            ("TSG PREEMPT", channel.group, rm.TSG_PREEMPT, struct.pack("BBxxI", 1, 1, 100_000)),
            ("TSG GET_INFO", channel.group, rm.TSG_GET_INFO, bytes(4)),
            ("TSG GET_TIMESLICE", channel.group, rm.TSG_GET_TIMESLICE, bytes(8)),
            ("TSG GPFIFO_SCHEDULE(1)", channel.group, rm.TSG_GPFIFO_SCHEDULE, enable),
            ("RESTART_RUNLIST", channel.channel, rm.RESTART_RUNLIST, bytes([0, 0])),
            (
                "GET_CTXSW_MODES",
                channel.subdevice,
                rm.GET_CTXSW_MODES,
                struct.pack("6I", channel.channel, *[0] * 5),
            ),
        ):
            try:
                client.control(handle, command, params)
                answers[name] = "ok"
            except rm.RmError as error:
                answers[name] = rm.describe(error.status)
            except DeviceError as error:
                answers[name] = str(error)
        answers["pidfd_getfd"] = _taken(victim.pid)
    refused = [name for name, answer in answers.items() if answer != "ok"]
    what = "every control answers" if not refused else f"refused: {', '.join(refused)}"
    figures = {
        "answers": answers,
        "as root": os.geteuid() == 0,
        "channels captured": dict(captured),
        "calls of libcuda": calls,
    }
    return Found("finding", what, figures)


def _taken(pid: int) -> str:
    try:
        files = driver_files(pid, rm.CTL_PATH)
    except OSError as error:
        return str(error)
    for fd in files:
        os.close(fd)
    return "ok" if files else "no control file among the process's descriptors"
