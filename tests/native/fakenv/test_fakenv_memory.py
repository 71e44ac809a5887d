# SPDX-License-Identifier: Apache-2.0
"""Device memory: who sees it when, what a touch of unmapped memory does, who pays, when it returns."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fakenv import Actor, FakeNvError, Machine, NewMachine

PAGE = 2 << 20
START = f"import ctypes, os, rm, driver_api; cu = driver_api.Cuda(); PAGE = {PAGE}; out = cu.host(4096)"


@pytest.fixture
def victim(machine: Machine) -> Actor:
    actor = machine.actor()
    actor.run(START)
    return actor


#                 how far the range is made        a touch works
STEPS = [
    pytest.param("base = cu.reserve(PAGE)", False, id="reserved"),
    pytest.param(
        "base = cu.reserve(PAGE); cu.map(base, PAGE, cu.create(PAGE), access=False)", False, id="mapped"
    ),
    pytest.param("base = cu.reserve(PAGE); cu.map(base, PAGE, cu.create(PAGE))", True, id="accessible"),
    pytest.param(
        "base = cu.reserve(PAGE); cu.map(base, PAGE, cu.create(PAGE)); cu.unmap(base, PAGE)",
        False,
        id="unmapped",
    ),
    pytest.param("base = cu.alloc(PAGE)", True, id="cuMemAlloc"),
    pytest.param("base = cu.alloc(PAGE); cu('cuMemFree_v2', base)", False, id="freed"),
]


@pytest.mark.parametrize(("prepare", "works"), STEPS)
def test_a_touch_by_the_processor(victim: Actor, prepare: str, works: bool) -> None:
    status = victim.run(
        prepare
        + """
child = os.fork()
if child == 0:
    ctypes.c_uint32.from_address(base).value  # a read: read-only zeros would not do
    os._exit(0)
result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    )
    assert status == (0 if works else -signal.SIGSEGV)


@pytest.mark.parametrize(("prepare", "works"), STEPS)
def test_a_touch_by_a_kernel(machine: Machine, victim: Actor, prepare: str, works: bool) -> None:
    victim.run(prepare)
    victim.run("cu.launch('touch_pages', base, PAGE, 4096, 7, 1)")
    assert victim.run("result = cu.code('cuCtxSynchronize')") == (0 if works else 700)
    assert machine.status()["xids"] == [[0, 0] if works else [31, 1]]
    if not works:
        assert victim.run("result = cu.code('cuMemcpyHtoD_v2', out, out, 8)") == 700, "the error stays"
        assert victim.process.poll() is None, "the process itself lives"


def test_memory_is_paid_for_and_comes_back(machine: Machine, victim: Actor) -> None:
    victim.run("base = cu.reserve(4 * PAGE); h = cu.create(2 * PAGE); cu.map(base, 2 * PAGE, h)")

    def used() -> int:
        free, total = victim.run("result = cu.info()")
        assert machine.status()["used_bytes"] == [total - free]
        return int(total - free)

    assert used() == 2 * PAGE
    victim.run("cu('cuMemRelease', h)")
    assert used() == 2 * PAGE, "a mapping holds the memory"
    victim.run("cu.unmap(base, 2 * PAGE)")
    assert used() == 0


def test_there_is_no_more_than_the_gpu_has(new_machine: NewMachine) -> None:
    actor = new_machine(memory_mib=64).actor()
    actor.run(START + "; kept = cu.create(48 << 20)")
    with pytest.raises(FakeNvError, match="CudaError: cuMemCreate: 2"):
        actor.run("cu.create(32 << 20)")
    actor.run("cu('cuMemRelease', kept); cu.create(64 << 20)")


def test_a_handle_travels_between_processes(machine: Machine, victim: Actor) -> None:
    """The agent creates memory without a context, two processes map it, the owner dies, it stays."""
    agent = machine.actor()
    agent.run(
        "import driver_api; cu = driver_api.Cuda(context=False);"
        f"h = cu.create({PAGE}, exportable=True); give = [cu.export(h)]"
    )
    fds = tuple(agent.fds)
    online = machine.actor()
    for actor in (victim, online):
        actor.run(START + "; base = cu.reserve(PAGE); cu.map(base, PAGE, cu.import_(fds[0]))", fds=fds)
    os.close(fds[0])
    victim.run("cu('cuMemsetD32_v2', base, ctypes.c_uint(0xABCD), PAGE // 4)")
    assert online.run("result = cu.read64(base + 8)") == 0xABCD0000ABCD
    assert machine.status()["used_bytes"] == [PAGE], "one piece of memory, however often it is mapped"
    agent.close()
    victim.close()
    assert online.run("result = cu.read64(base + 8)") == 0xABCD0000ABCD
    assert machine.status()["used_bytes"] == [PAGE]
    online.close()
    deadline = time.monotonic() + 5
    while machine.status()["used_bytes"] != [0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert machine.status()["used_bytes"] == [0]


def test_reclaim_below_libcuda_while_the_victim_is_stopped(machine: Machine, victim: Actor) -> None:
    """Sparse over a range and the memory back again, by UVM ioctls from another process."""
    inodes = [f["inode"] for f in machine.status()["files"] if f["kind"] == "uvm"]
    victim.run(f"""
        base = cu.reserve(2 * PAGE); cu.map(base, 2 * PAGE, cu.create(2 * PAGE))
        cu("cuMemsetD32_v2", base, ctypes.c_uint(5), PAGE // 2)
        give = rm.descriptors({inodes})
    """)
    fds = tuple(victim.fds)
    base = victim.run("result = base")
    client = next(c["handle"] for c in machine.status()["clients"] if c["pid"] == victim.pid)
    agent = machine.actor()
    agent.run("import rm; u = fds[0]", fds=fds)
    for fd in fds:
        os.close(fd)
    victim.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, victim.pid, os.WSTOPPED | os.WNOWAIT)
    assert agent.run(f"result = rm.uvm_sparse(u, {base} + {PAGE}, {PAGE})") == 0
    victim.process.send_signal(signal.SIGCONT)
    assert victim.run("result = [cu.read64(base), cu.read64(base + PAGE)]") == [0x500000005, 0]
    victim.run("cu.launch('touch_pages', base, 2 * PAGE, 4096, 7, 1); cu.synchronize()")  # no fault
    restored = agent.run(f"""
        place = lambda memory: rm.uvm_map(u, {base} + {PAGE}, {PAGE}, {client}, memory, offset={PAGE})
        result = [h for h in range(0x5c000000, 0x5c000040) if place(h) == 0]
    """)
    assert len(restored) == 1, "one object of the victim is memory of that size"
    assert victim.run("result = [cu.read64(base + 16), cu.read64(base + PAGE + 16)]") == [0x500000005] * 2


#                                              base        length    status
UVM_REFUSALS = [
    pytest.param("base + 4 * PAGE", "PAGE", 0x1E, id="outside every range"),
    pytest.param("base + 3 * PAGE", "2 * PAGE", 0x1E, id="over the end"),
    pytest.param("base + 4096", "4096", 0x1E, id="less than 64 KiB"),
    pytest.param("base", "65536", 0, id="64 KiB"),
]


@pytest.mark.parametrize(("base", "length", "status"), UVM_REFUSALS)
def test_sparse_ranges(victim: Actor, base: str, length: str, status: int) -> None:
    victim.run("u = rm.uvm_open(); base = 3 << 40; import struct")
    assert victim.run("result = rm.uvm(u, 73, struct.pack('QQIxxxx', base, 4 * PAGE, 9), 16)") == 0
    assert victim.run(f"result = rm.uvm_sparse(u, {base}, {length})") == status


def test_a_remap_under_a_running_kernel_is_counted(machine: Machine, victim: Actor) -> None:
    """The fake sees what a GPU would only punish now and then: mapped memory changed under a kernel."""
    victim.run("base = cu.alloc(2 * PAGE); cu.launch('spin_us', 20000000)")
    deadline = time.monotonic() + 5
    while (
        not any(c["state"] == "running" for c in machine.status()["channels"]) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    victim.run("fresh = cu.reserve(PAGE); cu.map(fresh, PAGE, cu.create(PAGE))")
    assert machine.status()["remaps_while_running"] == 0, "mapping what was not mapped is harmless"
    victim.run("cu.unmap(fresh, PAGE)")
    assert machine.status()["remaps_while_running"] == 1


@pytest.mark.parametrize("syncs", [False, True], ids=["does not wait", "waits for the context"])
def test_unmap_of_a_paused_context(machine: Machine, victim: Actor, syncs: bool) -> None:
    machine.ctl("unmap-syncs", int(syncs))
    victim.run("base = cu.reserve(PAGE); cu.map(base, PAGE, cu.create(PAGE)); cu.launch('spin_us', 50000)")
    status = machine.status()
    inodes = [f["inode"] for f in status["files"] if f["kind"] == "ctl"]
    channels = [c["handle"] for c in status["channels"]]
    victim.run(f"""
        import threading
        c = rm.Client(fd=rm.descriptors({inodes})[0], handle={status["clients"][0]["handle"]})
        t = rm.subdevice_of(c)
        assert c.disable(t, {channels}) == 0
        ctx, ended = ctypes.c_void_p(), threading.Event()
        cu("cuCtxGetCurrent", ctypes.byref(ctx))
        def unmap():
            cu("cuCtxSetCurrent", ctx); cu.unmap(base, PAGE); ended.set()
        thread = threading.Thread(target=unmap)
        thread.start()
    """)
    assert victim.run("result = ended.wait(0.2)") is not syncs
    assert victim.run(f"result = c.disable(t, {channels}, on=False)") == 0
    assert victim.run("result = ended.wait(10)")
    victim.run("thread.join(); cu.synchronize()")
