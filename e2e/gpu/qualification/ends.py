# SPDX-License-Identifier: Apache-2.0
"""E12 and E13: deaths while paused, and processes that are not of the simple shape.

Threading model: the part's main thread. Called by qualify.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from qualification.machine import Machine, Tools
from qualification.processes import Actor
from qualification.record import Found
from qualification.rig import BROKEN, Rig
from valve_agent.devices.nvidia import rm

RETURN_S = 20.0
CONTEXTS, CONTEXTS_FAKE = 9, 25
"""With 8 compute channels each, more than one DISABLE_CHANNELS holds."""


def _within(done: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until it was so; None if it was not."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > seconds:
            return None
        time.sleep(0.02)
    return round(time.monotonic() - began, 3)


def e12(machine: Machine, tools: Tools, count: int) -> Found:
    """kill -9 of a paused process; the agent's connection lost; a context destroyed while paused."""
    size = (64 if machine.is_fake else 2048) << 20
    figures: dict[str, Any] = {}
    with Rig(machine, tools) as rig:
        neighbour = rig.bare()
        before = neighbour.run("result = cu.free_bytes()")

        def returned() -> bool:
            return bool(neighbour.run("result = cu.free_bytes()") >= before - size // 4)

        victim, watch = rig.offline(), rig.watch(observed=False)
        victim.run(f"p = cu.alloc({size})")
        rig.run_timer(victim, watch)
        rig.quiesce(victim)
        victim.close()
        figures["killed while paused: memory is back after s"] = killed = _within(returned, RETURN_S)

        orphan, watch = rig.offline(), rig.watch(observed=False)
        rig.run_timer(orphan, watch)
        rig.hang_up(orphan)
        figures["agent gone: stands after s"] = alone = _within(lambda: watch.stands(0.05), RETURN_S)
        orphan.close()
        figures["killed after that: memory is back after s"] = after = _within(returned, RETURN_S)

        destroyer = rig.offline()
        destroyer.run("cu.launch('spin_us', 300000)")
        rig.quiesce(destroyer)
        destroyer.run("task = Background(lambda: cu('cuDevicePrimaryCtxRelease_v2', cu.gpu))")
        figures["context destroyed while paused: returned at once"] = destroyer.run("result = task.done(3)")
        rig.resume(destroyer)
        destroyed, error = destroyer.run("result = [task.done(30), task.error]")
        figures["context destroyed while paused: returned in the end"] = destroyed
        figures["context destroyed while paused: error"] = error
    if None in (killed, alone, after) or not destroyed:
        return Found("fail", "something stayed behind: see figures", figures)
    return Found(
        "pass", "deaths while paused leave nothing behind; without an agent offline stops itself", figures
    )


def e13(machine: Machine, tools: Tools, count: int) -> Found:
    """Graphs, new streams while paused, several contexts with more than 64 channels, two processes."""
    results: dict[str, Any] = {}
    contexts = CONTEXTS_FAKE if machine.is_fake else CONTEXTS
    cases: dict[str, Callable[[Rig], dict[str, Any]]] = {
        "graph launch": _graph,
        "stream made while paused": _new_stream,
        "several contexts": lambda rig: _contexts(rig, contexts),
        "two processes": _two,
    }
    for name, case in cases.items():
        try:
            with Rig(machine, tools) as rig:
                results[name] = case(rig)
        except BROKEN as error:
            results[name] = {"broke": str(error)}
        tools.clock.keep(results)
    gpus = sum(os.path.exists(f"/dev/nvidia{number}") for number in range(64))
    notes = ["MPS is not tried: Valve does not combine with it"]
    if gpus < 2:
        notes.append("several GPUs: not tried, this machine has one")
    bad = [name for name, good in results.items() if good.get("good") is not True]
    if bad:
        return Found("fail", f"not handled: {', '.join(bad)}", results, notes)
    return Found(
        "pass", "graphs, new streams, many contexts and two processes are paused and go on", results, notes
    )


def _graph(rig: Rig) -> dict[str, Any]:
    victim, watch = rig.offline(), rig.watch(observed=False)
    victim.run(f"page = cu.shared({watch.path!r}); graph = cu.graph('timer_writer', page, 600_000_000)")
    victim.run("cu('cuGraphLaunch', graph, 0)")
    ran = watch.advances()
    rig.pause(victim)
    stood = watch.stands()
    rig.resume(victim)
    return {"good": ran and stood and watch.advances(), "ran": ran, "stood": stood}


def _new_stream(rig: Rig) -> dict[str, Any]:
    victim, watch = rig.offline(), rig.watch(observed=False)
    victim.run(f"page = cu.shared({watch.path!r}); cu.launch('nop'); cu.synchronize()")
    rig.pause(victim)
    victim.run(
        "def work():\n"
        "    cu.enter(); cu.launch('timer_writer', page, 600_000_000, stream=cu.stream())\n"
        "task = Background(work)"
    )
    time.sleep(0.3)
    held = watch.clock == 0
    rig.resume(victim)
    return {"good": held and watch.advances(), "held while paused": held}


def _contexts(rig: Rig, contexts: int) -> dict[str, Any]:
    victim = rig.offline(cuda=False)
    watches = [rig.watch(observed=False) for _ in range(3)]
    victim.run(
        "import os; os.environ['CUDA_DEVICE_MAX_CONNECTIONS'] = '32'\n"
        f"made = [Cuda({rig.tools.kernels!r}, own_context=True) for _ in range({contexts})]\n"
        "result = None"
    )
    for watch, index in zip(watches, (0, contexts // 2, contexts - 1), strict=True):
        victim.run(
            f"cu = made[{index}]; cu.enter(); page = cu.shared({watch.path!r})\n"
            "cu.launch('timer_writer', page, 600_000_000)"
        )
    # Contexts of one process share the GPU in turns: give each its turn before it is called stuck.
    ran = all(watch.advances() for watch in watches)
    channels = sum(channel.computes for channel in rig.channels(victim))
    rig.pause(victim)
    stood = all(watch.stands(0.1) for watch in watches)
    rig.resume(victim)
    good = ran and stood and all(watch.advances() for watch in watches)
    return {
        "good": good,
        "compute channels": channels,
        "more than one call holds": channels > rm.CHANNELS_PER_CALL,
        "stood": stood,
    }


def _two(rig: Rig) -> dict[str, Any]:
    pairs: list[tuple[Actor, Any]] = [(rig.offline(), rig.watch(observed=False)) for _ in range(2)]
    for victim, watch in pairs:
        rig.run_timer(victim, watch)
    (first, first_watch), (second, second_watch) = pairs
    rig.pause(first)
    only_first = first_watch.stands() and second_watch.advances()
    rig.pause(first, second)
    both = first_watch.stands() and second_watch.stands()
    rig.resume(first, second)
    good = only_first and both and first_watch.advances() and second_watch.advances()
    return {"good": good, "one pause leaves the other alone": only_first, "both stood": both}
