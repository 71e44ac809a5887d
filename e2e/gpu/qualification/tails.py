# SPDX-License-Identifier: Apache-2.0
"""E10, E14 and the preemption bench: from the signal to an evicted GPU, and what an online process feels.

Threading model: the part's main thread. Called by qualify.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from qualification.evict import FULL_BLOCK, FULL_GRID
from qualification.machine import Machine, Tools
from qualification.processes import Actor, RigError, Watch
from qualification.record import Found, spread
from qualification.rig import BROKEN, Rig
from valve_agent.devices.nvidia import probe
from valve_agent.devices.nvidia.routes import AGENT, IN_PROCESS, LAUNCH_GATE, PATCHED
from valve_agent.gate_link import GateHandle, GateSettings

CHURN = """
stop = False
def churn():
    cu.enter()
    while not stop:
        p = cu.alloc({size}); cu("cuMemFree_v2", p)
        h = cu.create({size}); cu("cuMemRelease", h)
def contexts():
    while not stop:
        made = Cuda({kernels!r}, own_context=True); cu("cuCtxDestroy_v2", made.context)
task = Background({what})
"""
NEIGHBOURS = ("none", "churn", "contexts")
ROUTES = (AGENT, IN_PROCESS, PATCHED, LAUNCH_GATE)
SHORT_US = 200
"""Kernels for launch-gate, which waits for the end of what was launched."""
BLOCK = 100
GOAL_US = 1000.0


def _disturb(machine: Machine, tools: Tools, rig: Rig, what: str) -> Actor | None:
    if what == "none":
        return None
    size = (8 if machine.is_fake else 512) << 20
    neighbour = rig.bare()
    neighbour.run(CHURN.format(size=size, kernels=tools.kernels, what=what))
    return neighbour


def _calm(neighbour: Actor | None) -> None:
    if neighbour is None:
        return
    neighbour.run("stop = True")
    error = neighbour.run("task.done(30); result = task.error")
    if error:
        raise RigError(f"the neighbour broke: {error}")


def e10(machine: Machine, tools: Tools, count: int) -> Found:
    """One DISABLE_CHANNELS per pause while a neighbour holds the driver's locks."""
    figures: dict[str, Any] = {}
    for at, what in enumerate(NEIGHBOURS):
        name = f"neighbour: {what}"
        try:
            cycles = tools.clock.cycles(count, len(NEIGHBOURS) - at, name)
            figures[name] = _pauses(machine, tools, what, cycles)
        except BROKEN as error:
            figures[name] = {"broke": str(error)}
        tools.clock.keep(figures)
    if broken := [name for name, figure in figures.items() if "broke" in figure]:
        return Found("fail", f"broke: {'; '.join(broken)}: see figures", figures)
    worst = max(figure["pause"]["max_us"] for figure in figures.values())
    return Found("finding", f"the longest pause beside an allocating neighbour took {worst:.0f} us", figures)


def _pauses(machine: Machine, tools: Tools, what: str, cycles: Iterable[int]) -> dict[str, Any]:
    with Rig(machine, tools) as rig:
        victim, watch = rig.offline(), rig.watch(observed=False)
        grid, block = (1, 1) if machine.is_fake else (FULL_GRID, FULL_BLOCK)
        rig.run_timer(victim, watch, grid=grid, block=block)
        neighbour = _disturb(machine, tools, rig, what)
        pauses, resumes = [], []
        for _ in cycles:
            began, ended = rig.pause(victim)
            pauses.append(ended - began)
            began, ended = rig.resume(victim)
            resumes.append(ended - began)
            time.sleep(0.001)
        _calm(neighbour)
    return {"pause": spread(pauses), "resume": spread(resumes)}


def preempt(machine: Machine, tools: Tools, count: int) -> Found:
    """Online turns busy (libvalve's time stamp) until offline is evicted, through the real gate process.
    The goal is for routes that stop a kernel in the middle."""
    figures: dict[str, Any] = {}
    moved = 0
    verdicts = {verdict.route: verdict for verdict in probe.probe(machine.driver)}
    notes = [f"{route}: {verdicts[route].why}" for route in ROUTES if not verdicts[route].works]
    cases = [(route, what) for route in ROUTES if verdicts[route].works for what in ("none", "churn")]
    for at, (route, what) in enumerate(cases):
        name = f"{route}, neighbour: {what}"
        blocks = tools.clock.cycles(count, len(cases) - at, name, BLOCK)
        try:
            figures[name] = cycles = _preempt(machine, tools, route, what, blocks)
            moved += cycles["moved while said to be paused"]
        except BROKEN as error:  # the other cases still count
            figures[name] = {"broke": str(error)}
        tools.clock.keep(figures)
    broken = [name for name, figure in figures.items() if "broke" in figure]
    if not figures:
        return Found("fail", "no route works: see notes", figures, notes)
    if moved:
        answer = f"in {moved} cycles the victim moved while the gate said that it was paused"
        return Found("fail", answer, figures, notes)
    if broken:
        return Found("fail", f"broke: {'; '.join(broken)}: see figures", figures, notes)
    p99 = max(
        (
            figure["signal to evicted"]["p99_us"]
            for name, figure in figures.items()
            if LAUNCH_GATE not in name
        ),
        default=float("inf"),
    )
    met = "met" if p99 < GOAL_US else "missed"
    verdict = "pass" if machine.is_fake or p99 < GOAL_US else "fail"
    answer = f"signal to evicted: worst p99 of routes by channel {p99:.0f} us; the goal of 1 ms is {met}"
    return Found(verdict, answer, figures, notes)


def _preempt(machine: Machine, tools: Tools, route: str, what: str, blocks: Iterable[int]) -> dict[str, Any]:
    settings = GateSettings(
        cooldown_factor=0, cooldown_min_ns=0, recovery_grace_ns=0, lease_ns=60_000_000_000
    )
    gate = GateHandle.start(f"nvidia:{route}/none", settings)
    try:
        with Rig(machine, tools, gate=gate) as rig:
            victim, watch = rig.offline(), rig.watch(observed=False)
            grid, block = (1, 1) if machine.is_fake else (FULL_GRID, FULL_BLOCK)
            if route == LAUNCH_GATE:
                _short_kernels(victim, watch, grid, block)
            else:
                rig.run_timer(victim, watch, grid=grid, block=block)
            online = rig.online(watch)
            neighbour = _disturb(machine, tools, rig, what)
            time.sleep(0.1)
            gate.read_events()  # its first request made it connect: not one of ours
            pauses: list[dict[str, Any]] = []
            moved = count = 0
            for block in blocks:
                moved += online.cycles(block)
                count += block
                events = gate.read_events()
                pauses += [e for e in events if e["event"] == "pause" and e["reason"] == "busy"]
            _calm(neighbour)
            if len(pauses) != count:
                raise RigError(f"{len(pauses)} preemptions in {count} cycles: the figures would mean nothing")
            total = [pause["latency_us"] * 1e3 for pause in pauses]
            stop = [pause["stop_us"] * 1e3 for pause in pauses]
            return {
                "signal to evicted": spread(total),
                "of it, wake the gate": spread([a - b for a, b in zip(total, stop, strict=True)]),
                "of it, stop the channels": spread(stop),
                "moved while said to be paused": moved,
            }
    finally:
        gate.close()


def _short_kernels(victim: Actor, watch: Watch, grid: int, block: int) -> None:
    """One after the other, for as long as the process lives."""
    victim.run(
        f"page = cu.shared({watch.path!r})\n"
        "def work():\n"
        "    cu.enter()\n"
        "    while True:\n"
        f"        cu.launch('timer_writer', page, {SHORT_US}, grid={grid}, block={block})\n"
        "        cu.synchronize()\n"
        "task = Background(work)"
    )
    if not watch.advances():
        raise RigError("the kernels do not begin")


RATES_HZ = (1, 10, 100)


def e14(machine: Machine, tools: Tools, count: int) -> Found:
    """An online process's kernels of 200 us, while the victim is absent, shares, or comes and goes."""
    seconds = 0.2 if machine.is_fake else max(1.0, count / 10)
    figures: dict[str, Any] = {}
    with Rig(machine, tools) as rig:
        online = rig.bare()
        grid, block = (1, 1) if machine.is_fake else (FULL_GRID, FULL_BLOCK)
        online.run(
            "def loop(seconds):\n"
            "    times, until = [], time.monotonic() + seconds\n"
            "    while time.monotonic() < until:\n"
            f"        began = time.monotonic_ns(); cu.launch('spin_us', 200, grid=132, block={block})\n"
            "        cu.synchronize(); times.append(time.monotonic_ns() - began)\n"
            "    return times"
        )
        figures["alone"] = spread(online.run(f"result = loop({seconds})"))
        victim, watch = rig.offline(), rig.watch(observed=False)
        rig.run_timer(victim, watch, grid=grid, block=block)
        figures["sharing without Valve"] = spread(online.run(f"result = loop({seconds})"))
        for rate in RATES_HZ:
            online.start(f"result = loop({seconds})")
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                rig.pause(victim)
                time.sleep(0.5 / rate)
                rig.resume(victim)
                time.sleep(0.5 / rate)
            figures[f"offline comes and goes at {rate} Hz"] = spread(online.finish())
        rig.pause(victim)
        figures["offline is paused"] = spread(online.run(f"result = loop({seconds})"))
    ratio = figures["offline is paused"]["p99_us"] / figures["alone"]["p99_us"]
    for figure in figures.values():
        figure["p50 over alone"] = round(figure["p50_us"] / figures["alone"]["p50_us"], 3)
    return Found("finding", f"with offline paused an online kernel's p99 is {ratio:.2f} x of alone", figures)
