# SPDX-License-Identifier: Apache-2.0
"""Kernels on the fake GPU: they stop when their channels are disabled, and only then; they go on
where they were; what masks and what evicts can be told apart."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from fakenv import Actor, Machine

VICTIM = """
import rm, driver_api
cu = driver_api.Cuda()
out = cu.host(4096)
def stamp(): return [cu.read64(out), cu.read64(out + 8)]
"""
LONG_US = 20_000_000


class Controller:
    """The agent's side: the victim's control file by SCM_RIGHTS, its handles from the supervisor's model."""

    def __init__(self, machine: Machine, victim: Actor) -> None:
        self.machine = machine
        files = machine.status()["files"]
        inodes = [f["inode"] for f in files if f["kind"] == "ctl" and f["pid"] == victim.pid]
        victim.run(f"give = rm.descriptors({inodes})")
        self.actor = machine.actor()
        fds = tuple(victim.fds)
        client = machine.status()["clients"][-1]["handle"]
        self.actor.run(f"import rm, time; c = rm.Client(fd=fds[0], handle={client})", fds=fds)
        for fd in fds:
            os.close(fd)
        self.actor.run("t = rm.subdevice_of(c)")

    def channels(self, engine: int | None = 1) -> list[dict[str, Any]]:
        return [c for c in self.machine.status()["channels"] if engine in (None, c["engine"])]

    def disable(self, engine: int | None = 1, **options: object) -> int:
        listed = [c["handle"] for c in self.channels(engine)]
        status: int = self.actor.run(f"result = c.disable(t, {listed}, **{options!r})")
        return status

    def enable(self) -> int:
        return self.disable(engine=None, on=False)

    def group(self) -> int:
        """The compute group's handle: found by a control that only groups answer."""
        found: int = self.actor.run("""
            groups = range(0x5c000000, 0x5c000040)
            result = next(h for h in groups if c.control(h, rm.TSG_INFO, bytes(4)) == (0, bytes(4)))
        """)
        return found


@pytest.fixture
def victim(machine: Machine) -> Actor:
    actor = machine.actor()
    actor.run(VICTIM)
    return actor


@pytest.fixture
def control(machine: Machine, victim: Actor) -> Controller:
    return Controller(machine, victim)


def still(victim: Actor) -> bool:
    """Whether the victim's kernel makes no progress, by its own stamps in host memory."""
    before = victim.run("result = stamp()")
    time.sleep(0.03)
    after = victim.run("result = stamp()")
    return bool(before == after)


def running(victim: Actor) -> bool:
    deadline = time.monotonic() + 5
    while still(victim):
        if time.monotonic() > deadline:
            return False
    return True


def test_the_tree_of_a_context(machine: Machine, victim: Actor) -> None:
    channels = machine.status()["channels"]
    groups = {c["tsg"]: [d["engine"] for d in channels if d["tsg"] == c["tsg"]] for c in channels}
    assert sorted(groups.values()) == [[1] * 8, [9], [10]]


def test_disable_stops_a_kernel_in_the_middle(victim: Actor, control: Controller) -> None:
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    assert control.disable() == 0
    returned_ns = time.monotonic_ns()
    assert still(victim)
    last_ns, ctas = victim.run("result = stamp()")
    assert last_ns <= returned_ns, "no instruction of the kernel ran after the control had returned"
    assert ctas > 0
    assert [c["state"] for c in control.channels()].count("parked") == 1
    assert control.enable() == 0
    assert running(victim)
    assert victim.run("result = stamp()")[1] > ctas


def test_many_pauses_do_not_change_a_result(victim: Actor, control: Controller) -> None:
    victim.run("""
        p, sums = cu.alloc(8 << 20), cu.host(4096)
        cu("cuMemsetD32_v2", p, driver_api.ctypes.c_uint(0x9E3779B9), 2 << 20)
        def checksum():
            cu.launch("checksum", p, 8 << 20, 40, sums)
            cu.synchronize()
            return cu.read64(sums)
    """)
    expected = victim.run("result = checksum()")
    victim.start("result = checksum()")
    handles = [c["handle"] for c in control.channels()]
    cycles = control.actor.run(f"""
        for cycle in range(200):
            assert c.disable(t, {handles}) == 0
            assert c.disable(t, {handles}, on=False) == 0
            time.sleep(0.0002)
        result = cycle + 1
    """)
    assert cycles == 200
    assert victim.finish() == expected
    assert sum(c["evictions"] for c in control.channels()) > 0


def test_a_stopped_process_still_computes_until_its_channels_are_disabled(
    victim: Actor, control: Controller
) -> None:
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    victim.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, victim.pid, os.WSTOPPED | os.WNOWAIT)

    def ctas() -> int:
        return int(sum(c["ctas"] for c in control.channels()))

    before = ctas()
    time.sleep(0.03)
    assert ctas() > before, "SIGSTOP is for the processor, not for the GPU"
    assert control.disable() == 0
    before = ctas()
    time.sleep(0.03)
    assert ctas() == before
    victim.process.send_signal(signal.SIGCONT)
    assert still(victim)
    assert control.enable() == 0
    assert running(victim)


def test_only_scheduling_masks_but_does_not_evict(victim: Actor, control: Controller) -> None:
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    assert control.disable(only=True) == 0
    assert running(victim), "what is resident goes on"
    assert control.actor.run(f"result = c.preempt({control.group()})") == 0
    assert still(victim), "a preemption commits the mask"
    assert control.enable() == 0
    assert running(victim)


@pytest.mark.parametrize("commit", ["preempt", "restart"])
def test_when_disable_masks_and_a_second_step_commits(
    machine: Machine, victim: Actor, control: Controller, commit: str
) -> None:
    if commit == "restart" and os.geteuid() != 0:
        pytest.skip("RESTART_RUNLIST needs CAP_SYS_NICE")
    machine.ctl("evict", "commit")
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    assert control.disable() == 0
    assert running(victim)
    step = {
        "preempt": f"c.preempt({control.group()})",
        "restart": f"c.control({control.channels()[0]['handle']}, rm.RESTART_RUNLIST, b'\\1\\0')[0]",
    }[commit]
    assert control.actor.run(f"result = {step}") == 0
    assert still(victim)
    assert control.enable() == 0
    assert running(victim)


def test_when_siblings_keep_a_group_on_the_gpu(machine: Machine, victim: Actor, control: Controller) -> None:
    machine.ctl("evict", "siblings")
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    busy = next(c["handle"] for c in control.channels() if c["state"] == "running")
    assert control.actor.run(f"result = c.disable(t, [{busy}])") == 0
    assert running(victim), "one channel of eight is not the group"
    assert control.disable() == 0
    assert still(victim)


def test_a_preemption_alone_does_not_keep_work_away(victim: Actor, control: Controller) -> None:
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    assert control.actor.run(f"result = c.preempt({control.group()})") == 0
    assert running(victim)


def test_unscheduling_a_group_waits_for_its_kernel(victim: Actor, control: Controller) -> None:
    victim.run("cu.launch('timer_writer', out, 60000); cu.launch('timer_writer', out + 16, 60000)")
    assert running(victim)
    schedule = f"result = c.control({control.group()}, rm.TSG_SCHEDULE, bytes([%d, 0, 0]))[0]"
    assert control.actor.run(schedule % 0) == 0
    assert running(victim)
    deadline = time.monotonic() + 5
    while any(c["state"] == "running" for c in control.channels()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert victim.run("result = cu.read64(out + 24)") == 0, "the next kernel was not taken"
    assert control.actor.run(schedule % 1) == 0
    victim.run("cu.synchronize()")
    assert victim.run("result = cu.read64(out + 24)") == 3000


def test_copies_go_on_while_only_compute_is_paused(victim: Actor, control: Controller) -> None:
    victim.run("n = 4 << 20; p = cu.alloc(n); h = cu.host(n)")
    assert control.disable() == 0
    victim.run("cu('cuMemcpyDtoH_v2', h, p, n)")
    assert control.disable(engine=None) == 0
    victim.run("s = cu.stream(); cu('cuMemcpyDtoHAsync_v2', h, p, n, driver_api.ctypes.c_void_p(s))")
    time.sleep(0.03)
    query = "result = cu.code('cuStreamQuery', driver_api.ctypes.c_void_p(s))"
    assert victim.run(query) == 600
    assert control.enable() == 0
    victim.run("cu.synchronize()")
    assert victim.run(query) == 0


def test_a_full_ring_blocks_the_launcher_and_loses_nothing(victim: Actor, control: Controller) -> None:
    assert control.disable() == 0
    victim.start("""
        for i in range(300): cu.launch("store32", out, i)
        cu.synchronize()
        result = cu.read64(out)
    """)
    time.sleep(0.05)
    assert victim.process.poll() is None
    assert control.enable() == 0
    assert victim.finish() == 299


def test_graph_launches_and_events(victim: Actor) -> None:
    assert victim.run("""
        import ctypes
        c = ctypes
        g, node, ge, f = c.c_void_p(), c.c_void_p(), c.c_void_p(), c.c_void_p()
        cu("cuGraphCreate", c.byref(g), 0)
        cu("cuModuleGetFunction", c.byref(f), cu.module, b"store32")
        class Node(c.Structure):
            _fields_ = [("f", c.c_void_p), ("dims", c.c_uint * 6), ("shared", c.c_uint),
                        ("params", c.c_void_p), ("extra", c.c_void_p), ("kernel", c.c_void_p),
                        ("context", c.c_void_p)]
        values = [c.c_uint64(out), c.c_uint64(77)]
        params = (c.c_void_p * 2)(*[c.addressof(v) for v in values])
        cu("cuGraphAddKernelNode_v2", c.byref(node), g, None, 0,
           c.byref(Node(f, (c.c_uint * 6)(*[1] * 6), 0, c.addressof(params))))
        cu("cuGraphInstantiateWithFlags", c.byref(ge), g, 0)
        first, last, ms = c.c_void_p(), c.c_void_p(), c.c_float()
        for e in (first, last): cu("cuEventCreate", c.byref(e), 0)
        cu("cuEventRecord", first, 0)
        cu.launch("spin_us", 2000)
        cu("cuGraphLaunch", ge, 0)
        cu("cuEventRecord", last, 0)
        cu("cuEventSynchronize", last)
        cu("cuEventElapsedTime", c.byref(ms), first, last)
        result = [cu.read64(out), ms.value >= 2.0]
    """) == [77, True]


def test_streams_are_ordered_and_independent(victim: Actor, control: Controller) -> None:
    assert (
        victim.run("""
        import ctypes
        a, b, e = cu.stream(), cu.stream(), ctypes.c_void_p()
        cu("cuEventCreate", ctypes.byref(e), 0)
        cu.launch("spin_us", 5000, stream=a)
        cu.launch("store32", out, 1, stream=a)
        cu("cuEventRecord", e, ctypes.c_void_p(a))
        cu("cuStreamWaitEvent", ctypes.c_void_p(b), e, 0)
        cu.launch("copy", out + 8, out, 8, stream=b)
        cu("cuStreamSynchronize", ctypes.c_void_p(b))
        result = cu.read64(out + 8)
    """)
        == 1
    )


def test_stop_channel_is_for_ever(victim: Actor, control: Controller) -> None:
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    busy = next(c["handle"] for c in control.channels() if c["state"] == "running")
    assert control.actor.run(f"result = c.control({busy}, 0xA06F0112, b'\\1')[0]") == 0
    assert control.enable() == 0
    assert still(victim)


def test_rewind_drops_what_is_queued(victim: Actor, control: Controller) -> None:
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    victim.run("for i in range(5): cu.launch('store32', out + 64, 9)")
    assert control.disable(rewind=True) == 0
    busy = [c["token"] for c in control.channels() if c["state"] == "parked"]
    assert len(busy) == 1
    assert control.enable() == 0
    assert running(victim)
    assert victim.run("result = cu.read64(out + 64)") == 0


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_killed_victim_leaves_nothing(
    machine: Machine, victim: Actor, control: Controller, paused: bool
) -> None:
    victim.run(f"p = cu.alloc(64 << 20); cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    if paused:
        assert control.disable(engine=None) == 0
    control.actor.close()
    victim.close()
    deadline = time.monotonic() + 5
    while (
        machine.status()["files"] or machine.status()["used_bytes"] != [0]
    ) and time.monotonic() < deadline:
        time.sleep(0.01)
    status = machine.status()
    assert (status["files"], status["channels"], status["used_bytes"]) == ([], [], [0])
    assert status["evict_timeouts"] == 0


def test_two_contexts_and_two_processes(machine: Machine, victim: Actor, control: Controller) -> None:
    other = machine.actor()
    other.run(VICTIM)
    other.run(f"cu.launch('timer_writer', out, {LONG_US})")
    victim.run(f"cu.launch('timer_writer', out, {LONG_US})")
    assert running(victim)
    assert running(other)
    mine = [
        c["handle"] for c in control.channels() if c["client"] == machine.status()["clients"][-1]["handle"]
    ]
    assert control.actor.run(f"result = c.disable(t, {mine})") == 0
    assert still(victim)
    assert running(other), "a pause of one process does not touch another"
