# SPDX-License-Identifier: Apache-2.0
"""Failure modes on demand, NVML, and what a slow driver call holds up and what it does not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from fakenv import Machine, NewMachine

TREE = "import os, time, rm; c = rm.Client(); t = c.tree()"
DISABLE = "result = c.disable(t['subdevice'], t['channels'])"


def test_a_control_can_be_denied(machine: Machine) -> None:
    actor = machine.actor()
    actor.run(TREE)
    machine.ctl("deny", "control", "0x2080110b", "0x1b", 2)
    assert [actor.run(DISABLE) for _ in range(3)] == [0x1B, 0x1B, 0]
    machine.ctl("deny", "alloc", "0xc86f", "0x51")
    channel = "result = c.alloc(t['tsg'], rm.CHANNEL, bytes(368))[0]"
    assert actor.run(channel) == 0x51
    machine.ctl("clear")
    assert actor.run(channel) == 0


#                    how the lock comes to be held
SLOW = [
    pytest.param(lambda machine: machine.ctl("hold", 400), "pass", id="by nobody in particular"),
    pytest.param(
        lambda machine: machine.ctl("delay", "control", "0xa06c0106", 400000, 1),
        "c.control(t['tsg'], rm.TSG_INFO, bytes(4))",
        id="by a control of another process",
    ),
]


@pytest.mark.parametrize(("arrange", "call"), SLOW)
def test_a_slow_call_delays_calls_but_not_opens(
    machine: Machine, arrange: Callable[[Machine], str], call: str
) -> None:
    first, second = machine.actor(), machine.actor()
    for actor in (first, second):
        actor.run(TREE)
    arrange(machine)
    first.start(call)
    time.sleep(0.1)
    opens, control = second.run("""
        def timed(call):
            start = time.monotonic(); call(); return time.monotonic() - start
        opened = timed(lambda: os.close(os.open("/dev/null", os.O_RDONLY)))
        result = [opened, timed(lambda: c.control(t['tsg'], rm.GET_TIMESLICE, bytes(8)))]
    """)
    first.finish()
    assert opens < control / 2, "an open of an unrelated file does not wait for the driver"


def test_a_lost_gpu(machine: Machine) -> None:
    actor, cuda = machine.actor(), machine.actor()
    actor.run(TREE)
    cuda.run("import driver_api; cu = driver_api.Cuda(); cu.launch('spin_us', 20000000)")
    machine.ctl("lost", 0, 1)
    assert actor.run(DISABLE) == 0x0F
    assert actor.run("result = rm.try_open('/dev/nvidia0')") == 5
    assert cuda.run("result = cu.code('cuCtxSynchronize')") == 999
    assert machine.status()["xids"] == [[79, 1]]


NVML = """
import ctypes
n = ctypes.CDLL("libnvidia-ml.so.1")
u32, u64 = ctypes.c_uint32, ctypes.c_uint64
class Memory(ctypes.Structure): _fields_ = [(f, u64) for f in ("total", "free", "used")]
class Process(ctypes.Structure): _fields_ = [("pid", u32), ("used", u64), ("instances", u32 * 2)]
class Event(ctypes.Structure):
    _fields_ = [("device", ctypes.c_void_p), ("type", u64), ("data", u64), ("instances", u32 * 2)]
def text(call, *args):
    out = ctypes.create_string_buffer(96)
    code = call(*args, out, 96)
    return code or out.value.decode()
init, device = n.nvmlInit_v2(), ctypes.c_void_p()
if init == 0: assert n.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
def memory():
    m = Memory(); code = n.nvmlDeviceGetMemoryInfo(device, ctypes.byref(m))
    return code or [m.total, m.free, m.used]
def processes():
    count, out = ctypes.c_uint(8), (Process * 8)()
    code = n.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), out)
    return code or sorted([p.pid, p.used] for p in out[: count.value])
"""


def test_nvml_agrees_with_cuda(new_machine: NewMachine) -> None:
    machine = new_machine(branch="570", gpus=2, memory_mib=256)
    agent, tenant = machine.actor(), machine.actor()
    agent.run(NVML)
    tenant.run("import driver_api; cu = driver_api.Cuda(); base = cu.alloc(32 << 20)")
    assert agent.run("result = text(n.nvmlSystemGetDriverVersion)") == "570.211.01"
    assert agent.run("k = ctypes.c_uint(); n.nvmlDeviceGetCount_v2(ctypes.byref(k)); result = k.value") == 2
    assert agent.run("result = text(n.nvmlDeviceGetUUID, device)").startswith("GPU-66616b65")
    free, total = tenant.run("result = cu.info()")
    assert agent.run("result = memory()") == [total, free, 32 << 20]
    assert agent.run("result = processes()") == [[tenant.pid, 32 << 20]]
    tenant.run("cu('cuMemFree_v2', base)")
    assert agent.run("result = processes()") == [[tenant.pid, 0]]


def test_nvml_reports_events_and_a_lost_gpu(machine: Machine) -> None:
    agent = machine.actor()
    agent.run(
        NVML
        + """
events = ctypes.c_void_p()
assert n.nvmlEventSetCreate(ctypes.byref(events)) == 0
assert n.nvmlDeviceRegisterEvents(device, ctypes.c_uint64(8), events) == 0
def wait(ms):
    e = Event(); code = n.nvmlEventSetWait_v2(events, ctypes.byref(e), ms); return code or [e.type, e.data]
"""
    )
    assert agent.run("result = wait(0)") == 10
    machine.ctl("xid", 0, 45)
    assert agent.run("result = wait(5000)") == [8, 45]
    machine.ctl("lost", 0, 1)
    assert agent.run("result = wait(5000)") == [8, 79]
    assert agent.run("result = memory()") == 15


def test_without_a_driver_the_libraries_say_so(new_machine: NewMachine) -> None:
    actor = new_machine(no_driver=True).actor()
    actor.run(NVML)
    assert actor.run("result = init") == 9
    assert actor.run("result = ctypes.CDLL('libcuda.so.1').cuInit(0)") == 100


@pytest.mark.parametrize(
    "entry", ["cuLaunchKernel", "cuGraphLaunch", "cuMemAlloc", "cuMemGetInfo", "cuCtxCreate"]
)
def test_entry_points_are_found_by_their_base_name(machine: Machine, entry: str) -> None:
    assert machine.actor().run(f"""
        import ctypes
        lib, p, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_int(9)
        query = [{entry.encode()!r}, ctypes.byref(p), 12000, ctypes.c_uint64(0), ctypes.byref(found)]
        code = lib.cuGetProcAddress_v2(*query)
        result = [code, found.value, p.value is not None]
    """) == [0, 0, True]


def test_what_is_undocumented_is_not_there(machine: Machine) -> None:
    assert machine.actor().run("""
        import ctypes
        lib, p = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        result = [lib.cuGetProcAddress_v2(b"cuNoSuchCall", ctypes.byref(p), 12000, ctypes.c_uint64(0), None),
                  lib.cuGetExportTable(ctypes.byref(p), b"0" * 16)]
    """) == [500, 1]
