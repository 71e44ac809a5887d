# SPDX-License-Identifier: Apache-2.0
"""E4, E5, E6: what a process goes through while it is paused, often, long, and with work piling up.

Threading model: the part's main thread. Called by qualify.py.
"""

from __future__ import annotations

import time

from qualification.machine import Machine, Tools
from qualification.processes import Actor
from qualification.record import Found, spread
from qualification.rig import Rig

CHECKSUM = """
n, sums = {size}, cu.alloc(8)
p = cu.alloc(n)
cu.fill(p, n)
def checksum():
    cu("cuMemsetD32_v2", sums, ctypes.c_uint(0), 2)
    cu.launch("checksum", p, n, {rounds}, sums, grid={grid}, block={block})
    cu.synchronize()
    return cu.read64(sums)
"""


def _checksum(machine: Machine, seconds: float) -> str:
    """Code that makes `checksum()` in a victim, of about so long. The rounds are found by trying."""
    size, grid, block = (1 << 20, 1, 1) if machine.is_fake else (256 << 20, 1056, 256)
    code = "import ctypes" + CHECKSUM.format(size=size, rounds="rounds", grid=grid, block=block)
    return f"""{code}
rounds = 1
while True:
    began = time.monotonic()
    checksum()
    took = time.monotonic() - began
    if took > 0.02:
        break
    rounds *= 2
rounds = max(1, int(rounds * {seconds} / took))
expected = checksum()
assert expected == checksum(), "the checksum is not the same twice without any pause"
"""


def e4(machine: Machine, tools: Tools, count: int) -> Found:
    """`count` pauses and resumes of checksum kernels, as fast as they go, and a doorbell after none."""
    pauses, resumes, wrong, checks = [], [], 0, 0
    with Rig(machine, tools) as rig:
        victim = rig.offline()
        victim.run(_checksum(machine, 0.05 if machine.is_fake else 0.5))
        victim.run(
            "results = []\n"
            "def work():\n"
            "    cu.enter()\n"
            "    while not stop: results.append(checksum() == expected)\n"
            "stop = False; task = Background(work)"
        )
        for _ in tools.clock.cycles(count, 1, "pauses and resumes"):
            began, ended = rig.pause(victim)
            pauses.append(ended - began)
            began, ended = rig.resume(victim)
            resumes.append(ended - began)
            time.sleep(0.0005)
        victim.run("stop = True")
        done, error, results = victim.run("result = [task.done(60), task.error, results]")
        checks, wrong = len(results), results.count(False)
    figures = {
        "cycles": len(pauses), "checksums": checks, "wrong": wrong,
        "pause": spread(pauses), "resume": spread(resumes),
    }  # fmt: skip
    if error or not done:
        return Found("fail", f"the victim broke: {error or 'its kernel never ended'}", figures)
    if wrong or not checks:
        return Found("fail", f"{wrong} of {checks} checksums are wrong", figures)
    return Found(
        "pass",
        f"{len(pauses)} cycles, {checks} checksums bit-equal; work goes on without a doorbell",
        figures,
    )


def e5(machine: Machine, tools: Tools, count: int) -> Found:
    """Paused for `count` seconds with a thread waiting in cuCtxSynchronize, and once for a tenth of it."""
    figures: dict[str, object] = {}
    with Rig(machine, tools) as rig:
        victim = rig.offline()
        victim.run(_checksum(machine, 0.3))
        longest_s = min(float(count), tools.clock.left_s * 0.8)
        for length_s in (longest_s / 10, longest_s):
            victim.run("task = Background(lambda: (cu.enter(), checksum())[1])")
            time.sleep(0.05)
            rig.pause(victim)
            time.sleep(length_s)
            early = victim.run("result = task.done()")
            rig.resume(victim)
            done, error, equal = victim.run("result = [task.done(60), task.error, task.value == expected]")
            figures[f"paused {length_s:.3g} s"] = {
                "ended while paused": early, "went on": done, "bit-equal": equal, "error": error,
            }  # fmt: skip
            if early or error or not done or not equal:
                return Found(
                    "fail", f"a pause of {length_s:.3g} s did harm: {error or 'see figures'}", figures
                )
    return Found("pass", f"pauses of {longest_s / 10:.3g} s and {longest_s:.3g} s are harmless", figures)


def e6(machine: Machine, tools: Tools, count: int) -> Found:
    """`count` launches into a paused process: does the launcher block, is anything lost?"""
    with Rig(machine, tools) as rig:
        victim = rig.offline()
        victim.run("at = cu.alloc(8); cu.fill(at, 8, 0); cu.launch('store32', at, 7); cu.synchronize()")
        rig.pause(victim)
        gpu = rig.target(victim).gpu
        assert gpu is not None
        gpu.table.hold = 0  # libvalve would hold the first launch: here the ring is in question
        gpu.table.wake()
        victim.run(
            "sent = [0]\n"
            "def flood():\n"
            "    cu.enter()\n"
            f"    for i in range({count}):\n"
            "        cu.launch('store32', at, i); sent[0] = i + 1\n"
            "    cu.synchronize()\n"
            "    return cu.read64(at) & 0xffffffff\n"
            "task = Background(flood)"
        )
        blocked_at = _comes_to_rest(victim)
        early = victim.run("result = task.done()")
        rig.resume(victim)
        done, error, last = victim.run("result = [task.done(100), task.error, task.value]")
    figures = {
        "launches": count,
        "launches taken while paused": blocked_at,
        "last value": last,
        "error": error,
    }
    if early or error or not done or last != count - 1:
        return Found("fail", f"launches into a paused process: {error or 'lost or run too early'}", figures)
    return Found("pass", f"the launcher blocks after {blocked_at} launches and all {count} complete", figures)


def _comes_to_rest(victim: Actor) -> int:
    """How many launches it has sent when it sends no more."""
    before = -1
    for _ in range(200):
        sent: int = victim.run("result = sent[0]")
        if sent == before:
            break
        before = sent
        time.sleep(0.1)
    return before
