# SPDX-License-Identifier: Apache-2.0
"""E8, E9, E11: memory of a paused process: through its libcuda, below it, and under running copies.

Threading model: the part's main thread. Called by qualify.py.
"""

from __future__ import annotations

import os
import time

from qualification.machine import Machine, Tools
from qualification.processes import Actor
from qualification.reach import driver_files
from qualification.record import Found
from qualification.rig import Rig
from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia.cuda_driver import CudaDriver
from valve_agent.devices.nvidia.physical import PhysicalSlabs
from valve_agent.devices.nvidia.uvm import Mapper

MIB = 1 << 20
BLOCKS_S, BLOCKS_FAKE_S = 5.0, 1.0
"""A call that has not returned by then waits for the context."""
PATTERN = 0x5EED5EED


def e8(machine: Machine, tools: Tools, count: int) -> Found:
    """cuMemUnmap, cuMemMap, cuMemSetAccess in a paused process, idle and in the middle of a kernel."""
    figures: dict[str, object] = {}
    blocked = []
    patience_s = BLOCKS_FAKE_S if machine.is_fake else BLOCKS_S
    for load in ("idle", "in a kernel"):
        for extent in ("compute paused", "copy engines too"):
            with Rig(machine, tools) as rig:
                victim, watch = rig.offline(), rig.watch(observed=False)
                victim.run(
                    "size = 2 << 20; base = cu.reserve(size); a, b = cu.create(size), cu.create(size)\n"
                    "cu.map(base, size, a)"
                )
                if load == "in a kernel":
                    rig.run_timer(victim, watch, us=round(1.5e6 * patience_s))  # it ends, once it may run
                (rig.quiesce if extent == "copy engines too" else rig.pause)(victim)
                victim.run(
                    "times = {}\n"
                    "def step(name, call):\n"
                    "    began = time.monotonic(); call()\n"
                    "    times[name] = round((time.monotonic() - began) * 1e6, 1)\n"
                    "def work():\n"
                    "    cu.enter()\n"
                    "    step('unmap_us', lambda: cu.unmap(base, size))\n"
                    "    step('map_and_access_us', lambda: cu.map(base, size, b))\n"
                    "task = Background(work)"
                )
                done = victim.run(f"result = task.done({patience_s})")
                rig.resume(victim)
                after, error, times = victim.run("result = [task.done(20), task.error, times]")
                case = f"{load}, {extent}"
                figures[case] = {
                    "returned while paused": done,
                    "returned after": after,
                    "error": error,
                    **times,
                }
                tools.clock.keep(figures)
                if not done:
                    blocked.append(case)
                if error or not after:
                    return Found("fail", f"{case}: {error or 'it never returned'}", figures)
    if blocked:
        return Found(
            "finding", f"libcuda waits for the context: {'; '.join(blocked)}: remap below it (UVM)", figures
        )
    return Found("finding", "libcuda remaps in a paused process without waiting", figures)


class Below:
    """Agent-owned slabs, and a victim whose range shows them: all below the victim's libcuda."""

    def __init__(self, machine: Machine, rig: Rig, victim: Actor, slab_bytes: int, slabs: int) -> None:
        """The victim has reserved `slabs` slabs and maps one allocation of its own at each."""
        self.slab_bytes = slab_bytes
        driver = CudaDriver()
        self.physical = PhysicalSlabs(driver, 0, slab_bytes, slabs + 1, scrub=False)
        self.mapper = Mapper(
            machine.branch, driver.uuid(0), self.physical.client.fd, self.physical.client.handle
        )
        self.physical.fill(slabs + 1)
        self.quarantine = self.physical.take()
        self.slabs = [self.physical.take() for _ in range(slabs)]
        self.base: int = victim.run(
            f"size, n = {slab_bytes}, {slabs}\n"
            "base = cu.reserve(size * n); alias = cu.create(size)\n"
            "for i in range(n): cu.map(base + i * size, size, alias)\n"
            "result = base"
        )
        self.uvm = self._find(rig, victim)

    def _find(self, rig: Rig, victim: Actor) -> int:
        files = driver_files(victim.pid, "/dev/nvidia-uvm")
        rig.quiesce(victim)
        refusals = []
        try:
            for fd in files:
                try:
                    self.mapper.map(fd, self.base, self.slab_bytes, self.quarantine.memory)
                except DeviceError as error:
                    refusals.append(str(error))
                    continue
                for other in files:
                    if other != fd:
                        os.close(other)
                return fd
        finally:
            rig.resume(victim)
        raise DeviceError(f"UVM maps on none of {len(files)} files: {'; '.join(refusals)}")

    def show(self, memory_of: str) -> None:
        """`slabs` or `quarantine` at every place; the victim is evicted."""
        for i, slab in enumerate(self.slabs):
            memory = slab.memory if memory_of == "slabs" else self.quarantine.memory
            self.mapper.map(self.uvm, self.base + i * self.slab_bytes, self.slab_bytes, memory)

    def sparse(self) -> int:
        """No memory at any place; the number of calls. One, if libcuda made one UVM range of the places."""
        try:
            self.mapper.sparse(self.uvm, self.base, self.slab_bytes * len(self.slabs))
        except DeviceError:
            for i in range(len(self.slabs)):
                self.mapper.sparse(self.uvm, self.base + i * self.slab_bytes, self.slab_bytes)
            return len(self.slabs)
        return 1

    def close(self) -> None:
        os.close(self.uvm)
        self.physical.give([self.quarantine, *self.slabs])
        self.physical.close()


def e9(machine: Machine, tools: Tools, count: int) -> Found:
    """SPARSE under a victim: loads, stores, restore, and what each length costs."""
    figures: dict[str, object] = {}
    sizes = [2 * MIB, 8 * MIB] if machine.is_fake else [2 * MIB, 32 * MIB, 128 * MIB, 1024 * MIB]
    problems = []
    for size in sizes:
        with Rig(machine, tools) as rig:
            victim = rig.offline()
            below = Below(machine, rig, victim, size, 1)
            times: dict[str, float] = {}

            def evicted(
                name: str,
                call: object,
                rig: Rig = rig,
                victim: Actor = victim,
                times: dict[str, float] = times,
            ) -> None:
                assert callable(call)
                rig.quiesce(victim)
                began = time.monotonic_ns()
                call()
                times[name] = (time.monotonic_ns() - began) / 1e3
                rig.resume(victim)

            evicted("map_us", lambda below=below: below.show("slabs"))
            victim.run(f"cu.fill(base, size, {PATTERN}); cu.synchronize()")
            evicted("sparse_us", below.sparse)
            victim.run("spot = cu.alloc(4096); cu.launch('copy', spot, base, 4096); cu.synchronize()")
            read = victim.run("result = cu.read64(spot)")
            victim.run(
                "cu.launch('store32', base, 9); cu.synchronize()\n"
                "cu.launch('copy', spot, base, 8); cu.synchronize()"
            )
            stored = victim.run("result = cu.read64(spot)")
            evicted("restore_us", lambda below=below: below.show("slabs"))
            victim.run("cu.launch('copy', spot, base + size - 4096, 4096); cu.synchronize()")
            restored = victim.run("result = cu.read64(spot)") & 0xFFFFFFFF
            figures[f"{size // MIB} MiB"] = {
                **times, "load from sparse": read, "load after a store": stored,
                "restored": restored == PATTERN,
            }  # fmt: skip
            tools.clock.keep(figures)
            if read != 0 or restored != PATTERN:
                problems.append(f"{size // MIB} MiB")
            below.close()
    if problems:
        return Found("fail", f"wrong contents at {', '.join(problems)}", figures)
    stores = {value["load after a store"] for value in figures.values() if isinstance(value, dict)}
    what = "stores are dropped" if stores == {0} else "stores are seen again until the next map"
    return Found("pass", f"SPARSE reads 0, {what}; the old contents come back", figures)


def e11(machine: Machine, tools: Tools, count: int) -> Found:
    """Copies to the host in flight while compute only, or everything, is paused."""
    size = 8 * MIB if machine.is_fake else 2048 * MIB
    figures: dict[str, object] = {}
    for extent in ("compute paused", "copy engines too"):
        with Rig(machine, tools) as rig:
            victim = rig.offline()
            victim.run(
                f"import ctypes; n = {size}; p, h = cu.alloc(n), cu.host(n); s = cu.stream()\n"
                f"cu.fill(p, n, {PATTERN})\n"
                "def copy():\n"
                "    cu('cuMemcpyDtoHAsync_v2', ctypes.c_void_p(h), p, n, ctypes.c_void_p(s))\n"
                "def ended(): return cu.code('cuStreamQuery', ctypes.c_void_p(s)) == 0\n"
                "def equal():\n"
                f"    word = ({PATTERN}).to_bytes(4, 'little') * 1024\n"
                "    view = memoryview((ctypes.c_char * n).from_address(h)).cast('B')\n"
                "    return all(bytes(view[i:i + 4096]) == word for i in range(0, n, 4096))"
            )
            wrong = moved = 0
            for _ in tools.clock.cycles(count, 2 if extent == "compute paused" else 1, extent):
                victim.run("ctypes.memset(h, 0, n); copy()")
                (rig.quiesce if extent == "copy engines too" else rig.pause)(victim)
                before = victim.run("result = ended()")
                time.sleep(0.2)
                moved += victim.run("result = ended()") and not before
                rig.resume(victim)
                victim.run("cu.synchronize()")
                wrong += not victim.run("result = equal()")
            figures[extent] = {"copies": count, "ended while paused": moved, "wrong": wrong}
            if wrong:
                return Found("fail", f"{extent}: {wrong} of {count} copies arrived wrong", figures)
    held = figures["copy engines too"]
    assert isinstance(held, dict)
    if held["ended while paused"]:
        return Found("fail", "a copy ended although the copy engines were paused", figures)
    return Found("pass", "copies are whole; with the copy engines paused none moves", figures)
