# SPDX-License-Identifier: Apache-2.0
"""E1, E2, E3, E16: what takes a running kernel off the GPU, and what each step costs.

Threading model: the part's main thread. Called by qualify.py.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable

from qualification.machine import Machine, Tools
from qualification.processes import Actor, Watch
from qualification.record import Found, spread
from qualification.rig import Rig
from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.plan import Commit
from valve_agent.devices.nvidia.table import Channel

SETTLE_S = 0.0002
"""A store that had left the GPU when it was evicted is in host memory by then."""
FULL_GRID, FULL_BLOCK = 1024, 256


def _shape(machine: Machine) -> list[tuple[str, int, int]]:
    """A lone thread, and every SM full of registers to save."""
    shapes = [("one thread", 1, 1)]
    return shapes if machine.is_fake else [*shapes, ("every SM", FULL_GRID, FULL_BLOCK)]


def e1(machine: Machine, tools: Tools, count: int) -> Found:
    """DISABLE_CHANNELS of all compute channels, nothing else, on a kernel that would run for minutes."""
    figures: dict[str, object] = {}
    moved = 0
    shapes = _shape(machine)
    for at, (shape, grid, block) in enumerate(shapes):
        with Rig(machine, tools) as rig:
            victim, watch = rig.offline(), rig.watch()
            rig.run_timer(victim, watch, grid=grid, block=block)
            call_ns, last_ns, late_ns = [], [], []
            for _ in tools.clock.cycles(count, len(shapes) - at, shape):
                began, ended = rig.pause(victim)
                time.sleep(SETTLE_S)
                settled, stands = watch.clock, watch.stands(0.005)
                moved += not stands or watch.clock != settled
                call_ns.append(ended - began)
                last_ns.append(watch.changed_ns - began)
                late_ns.append(watch.changed_ns - ended)
                rig.resume(victim)
                if not watch.advances():
                    return Found("fail", f"after {len(call_ns)} cycles the kernel does not go on", figures)
            figures[shape] = {
                "call": spread(call_ns),
                "from the call to the kernel's last store": spread(last_ns),
                "last store after the call's return (negative: before)": spread(late_ns),
            }
            tools.clock.keep(figures)
    figures["cycles in which the kernel moved after the call"] = moved
    if moved:
        return Found(
            "fail", f"DISABLE_CHANNELS alone did not evict in {moved} cycles: see e3 for what does", figures
        )
    return Found("pass", "DISABLE_CHANNELS alone evicts a running kernel before it returns", figures)


def e2(machine: Machine, tools: Tools, count: int) -> Found:
    """Each channel of the compute group alone, then all but one, then all."""
    with Rig(machine, tools) as rig:
        victim, watch = rig.offline(), rig.watch(observed=False)
        rig.run_timer(victim, watch)
        compute = [channel for channel in rig.channels(victim) if channel.computes]
        stopped_by_one = []
        for channel in compute:
            _set(rig, victim, [channel], True)
            if watch.stands():
                stopped_by_one.append(f"0x{channel.channel:x}")
            _set(rig, victim, compute, False)
            if not watch.advances():
                return Found("fail", "the kernel does not go on after its channel was enabled")
        _set(rig, victim, compute, True)
        all_stop = watch.stands()
        _set(rig, victim, compute, False)
        figures = {
            "compute channels": len(compute),
            "groups": len({channel.group for channel in compute}),
            "channels that stop the kernel alone": stopped_by_one,
            "all of them stop it": all_stop,
        }
    if not all_stop:
        return Found("fail", "not even all channels together stop the kernel", figures)
    what = (
        "one suffices, the one that launches" if stopped_by_one else "no single channel does: all are needed"
    )
    return Found("finding", f"all channels stop the kernel; {what}", figures)


def e3(machine: Machine, tools: Tools, count: int) -> Found:
    """Cost of each commit step on an idle and on a busy victim, and of a call that does nothing."""
    figures: dict[str, object] = {}
    evicts: dict[str, bool] = {}
    steps_left = 6
    for commit in (Commit.NONE, Commit.PREEMPT, Commit.RESTART):
        for load in ("idle", "busy"):
            with Rig(machine, tools, commit=commit) as rig:
                victim, watch = rig.offline(), rig.watch(observed=False)
                if load == "busy":
                    _, grid, block = _shape(machine)[-1]
                    rig.run_timer(victim, watch, grid=grid, block=block)
                else:
                    victim.run("cu.launch('nop'); cu.synchronize()")
                seen = watch if load == "busy" else None
                try:
                    cycles = tools.clock.cycles(count, steps_left, f"{commit.value}, {load}")
                    figures[f"{commit.value}, {load}"] = _cycles(rig, victim, seen, cycles, evicts, commit)
                except DeviceError as error:  # a variant that does not work is an answer
                    figures[f"{commit.value}, {load}"] = {"refused": str(error)}
            steps_left -= 1
            tools.clock.keep(figures)
    with Rig(machine, tools) as rig:
        name = "round trip of a control that does nothing (TSG GET_INFO)"
        figures[name] = _round_trip(rig, rig.offline(), count)
    working = [name for name, good in evicts.items() if good]
    if not working:
        return Found("fail", "no variant evicts", figures)
    needed = "none is needed" if "none" in working else f"DISABLE alone does not evict; {working[0]} does"
    return Found("pass", f"commit steps: {needed}; what evicts: {', '.join(working)}", figures)


def _cycles(
    rig: Rig,
    victim: Actor,
    watch: Watch | None,
    cycles: Iterable[int],
    evicts: dict[str, bool],
    commit: Commit,
) -> dict[str, object]:
    pauses, resumes = [], []
    moved = 0
    for cycle, _ in enumerate(cycles):
        began, ended = rig.pause(victim)
        pauses.append(ended - began)
        if watch and cycle < 20:
            time.sleep(SETTLE_S)
            moved += not watch.stands(0.003)
        began, ended = rig.resume(victim)
        resumes.append(ended - began)
        time.sleep(0.0003)
    if watch:
        evicts[commit.value] = moved == 0
    return {"pause": spread(pauses), "resume": spread(resumes), "moved while paused (of 20)": moved}


def _round_trip(rig: Rig, victim: Actor, count: int) -> dict[str, float]:
    channel = next(channel for channel in rig.channels(victim) if channel.computes and channel.group)
    fd = rig.control_file(victim, channel)
    client = rm.RmClient(fd, channel.client)
    times = []
    for _ in range(count):
        began = time.monotonic_ns()
        client.control(channel.group, rm.TSG_GET_INFO, bytes(4))
        times.append(time.monotonic_ns() - began)
    return spread(times)


def _set(rig: Rig, victim: Actor, channels: list[Channel], disable: bool) -> None:
    """Below the product's plan: exactly these channels. Raises RmError."""
    places: dict[tuple[int, int, int], list[int]] = {}
    for channel in channels:
        place = (rig.control_file(victim, channel), channel.client, channel.subdevice)
        places.setdefault(place, []).append(channel.channel)
    for (fd, client, subdevice), handles in places.items():
        for block in rm.disable_blocks(client, subdevice, handles, disable):
            status = block.issue(fd)
            if status:
                raise rm.error_of("FIFO_DISABLE_CHANNELS", status)


CTXSW = struct.Struct("6I")
"""hChannel, zcull, pm, smpc, compute preemption, graphics preemption"""
CTXSW_MODES = {0: "wait for idle", 1: "at block boundaries (CTA)", 2: "at any instruction (CILP)"}


def e16(machine: Machine, tools: Tools, count: int) -> Found:
    """Compute preemption mode of each compute channel, as the driver says it."""
    modes: dict[str, str] = {}
    with Rig(machine, tools) as rig:
        victim = rig.offline()
        for channel in (channel for channel in rig.channels(victim) if channel.computes):
            client = rm.RmClient(rig.control_file(victim, channel), channel.client)
            try:
                asked = CTXSW.pack(channel.channel, 0, 0, 0, 0, 0)
                answer = client.control(channel.subdevice, rm.GET_CTXSW_MODES, asked)
                mode = CTXSW.unpack(answer)[4]
                modes[f"0x{channel.channel:x}"] = CTXSW_MODES.get(mode, str(mode))
            except rm.RmError as error:
                modes[f"0x{channel.channel:x}"] = str(error)
    answers = sorted(set(modes.values()))
    return Found("finding", f"compute preemption: {'; '.join(answers)}", {"modes": modes})
