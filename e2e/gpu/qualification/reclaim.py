# SPDX-License-Identifier: Apache-2.0
"""The reclaim bench: memory in use taken from an offline process and brought back, by slab size.

Three ways in one run: Valve's (agent-owned slabs, remapped below the victim's libcuda while it is evicted),
the same by SPARSE, and the baseline, a process that swaps 2 MiB pages itself through libcuda as elastic KV
caches do today (unmap, map a spare page, set access), which needs it to be idle.

Threading model: the part's main thread. Called by qualify.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from qualification.machine import Machine, Tools
from qualification.record import Found, spread
from qualification.remap import MIB, PATTERN, Below
from qualification.rig import BROKEN, Rig

SLABS_MIB = (2, 32, 128)
TOTALS_MIB = (1024, 4096, 16_384)
FAKE_SLABS_MIB, FAKE_TOTALS_MIB = (2, 4), (8,)
BASELINE = """
page, n = 2 << 20, {pages}
own = cu.reserve(page * n)
handles, spare = [cu.create(page) for _ in range(n)], cu.create(page)
for i in range(n): cu.map(own + i * page, page, handles[i])
cu.fill(own, page * n); cu.synchronize(); time.sleep(0.05)
def swap(show):
    began = time.monotonic_ns()
    for i in range(n):
        cu.unmap(own + i * page, page)
        cu.map(own + i * page, page, show(i))
    return time.monotonic_ns() - began
"""


def reclaim(machine: Machine, tools: Tools, count: int) -> Found:
    """`count` times per size; ms per GiB is of the medians."""
    figures: dict[str, Any] = {}
    wrong = []
    clock = tools.clock
    totals, slabs = (FAKE_TOTALS_MIB, FAKE_SLABS_MIB) if machine.is_fake else (TOTALS_MIB, SLABS_MIB)
    steps_left = len(totals) * (len(slabs) + 1)
    for total in totals:
        for slab in slabs:
            name = f"{total} MiB in slabs of {slab} MiB"
            cycles = clock.cycles(count, steps_left, name)
            try:
                figures[name], good = _valve(machine, tools, total, slab, cycles)
                if not good:
                    wrong.append(name)
            except BROKEN as error:
                figures[name] = {"broke": str(error)}
            clock.keep(figures)
            steps_left -= 1
        name = f"{total} MiB, baseline: pages of 2 MiB by libcuda"
        cycles = clock.cycles(max(1, count // 3), steps_left, name)
        try:
            figures[name] = _baseline(machine, tools, total, cycles)
        except BROKEN as error:
            figures[name] = {"broke": str(error)}
        clock.keep(figures)
        steps_left -= 1
    if wrong:
        return Found("fail", f"contents did not survive: {', '.join(wrong)}", figures)
    if broken := [name for name, figure in figures.items() if "broke" in figure]:
        return Found("fail", f"broke: {'; '.join(broken)}: see figures", figures)
    best = min(
        (figure["reclaim"]["ms_per_gib"], name) for name, figure in figures.items() if "baseline" not in name
    )
    base = min(figure["reclaim"]["ms_per_gib"] for name, figure in figures.items() if "baseline" in name)
    answer = f"best reclaim {best[0]} ms per GiB ({best[1]}); 2 MiB pages by libcuda {base} ms per GiB"
    return Found("pass", answer, figures)


def _valve(
    machine: Machine, tools: Tools, total_mib: int, slab_mib: int, cycles: Iterable[int]
) -> tuple[dict[str, Any], bool]:
    """(figures, whether every slab came back with its contents)"""
    sparse_calls = 0
    evict_ns, reclaim_ns, restore_ns, resume_ns, sparse_ns = [], [], [], [], []
    good = True
    with Rig(machine, tools) as rig:
        victim, watch = rig.offline(), rig.watch(observed=False)
        below = Below(machine, rig, victim, slab_mib * MIB, total_mib // slab_mib)
        rig.quiesce(victim)
        below.show("slabs")
        rig.resume(victim)
        victim.run(f"import ctypes; cu.fill(base, size * n, {PATTERN}); cu.synchronize(); spot = cu.alloc(8)")
        rig.run_timer(victim, watch)
        for _ in cycles:
            began, evicted = rig.quiesce(victim)
            evict_ns.append(evicted - began)
            began = time.monotonic_ns()
            below.show("quarantine")
            reclaim_ns.append(time.monotonic_ns() - began)
            began = time.monotonic_ns()
            sparse_calls = below.sparse()
            sparse_ns.append(time.monotonic_ns() - began)
            began = time.monotonic_ns()
            below.show("slabs")
            restore_ns.append(time.monotonic_ns() - began)
            began, ended = rig.resume(victim)
            resume_ns.append(ended - began)
            time.sleep(0.002)
        good = watch.advances() and victim.run(
            "s = cu.stream(); first = []\n"
            "for i in range(n):\n"
            "    cu.launch('copy', spot, base + i * size, 8, stream=s)\n"
            "    cu('cuStreamSynchronize', ctypes.c_void_p(s))\n"
            "    host = ctypes.c_uint64()\n"
            "    cu('cuMemcpyDtoHAsync_v2', ctypes.byref(host), spot, 8, ctypes.c_void_p(s))\n"
            "    cu('cuStreamSynchronize', ctypes.c_void_p(s)); first.append(host.value & 0xffffffff)\n"
            f"result = all(value == {PATTERN} for value in first)"
        )
        below.close()
    return {
        "evict, copy engines too": spread(evict_ns),
        "reclaim": _per_gib(reclaim_ns, total_mib),
        "reclaim by SPARSE": {**_per_gib(sparse_ns, total_mib), "calls": sparse_calls},
        "restore": _per_gib(restore_ns, total_mib),
        "resume": spread(resume_ns),
        "contents came back": good,
    }, good


def _baseline(machine: Machine, tools: Tools, total_mib: int, cycles: Iterable[int]) -> dict[str, Any]:
    with Rig(machine, tools) as rig:
        alone = rig.bare()
        alone.run(BASELINE.format(pages=total_mib // 2))
        reclaim_ns, restore_ns = [], []
        for _ in cycles:
            reclaim_ns.append(alone.run("result = swap(lambda i: spare)"))
            restore_ns.append(alone.run("result = swap(lambda i: handles[i])"))
    return {"reclaim": _per_gib(reclaim_ns, total_mib), "restore": _per_gib(restore_ns, total_mib)}


def _per_gib(times_ns: list[int], total_mib: int) -> dict[str, float]:
    figures = spread(times_ns)
    figures["ms_per_gib"] = round(figures["p50_us"] / 1e3 / (total_mib / 1024), 3)
    return figures
