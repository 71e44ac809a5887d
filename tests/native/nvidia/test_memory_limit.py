# SPDX-License-Identifier: Apache-2.0
"""An offline process cannot have more GPU memory than its tenant may, whichever way it asks."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_rig import SLAB, Rig, Tenant, wait_for
from victims import compile_program

OUT_OF_MEMORY = 2
HELD = """
p = ctypes.c_uint64(); h = ctypes.c_uint64(); pitch = ctypes.c_size_t()
prop = driver_api.Prop(1, 0, 1, 0)
shape = (ctypes.c_uint64 * 3)()
def array(out, slabs):
    shape[:] = (1024, slabs * SLAB // 4096, 4 << 32 | 1)  # four channels of one byte
    return cu.code('cuArrayCreate_v2', out, ctypes.addressof(shape))
"""
FOUND = """
def found(name):
    f = ctypes.c_void_p()
    cu("cuGetProcAddress_v2", name.encode(), ctypes.byref(f), 12000, 0, None)
    return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint64] * 4)(f.value)
"""
#                             allocate {} slabs                                    give it back
WAYS = [
    pytest.param("cu.code('cuMemAlloc_v2', p_, {0} * SLAB)", "cu('cuMemFree_v2', p.value)", id="cuMemAlloc"),
    pytest.param("found('cuMemAlloc')(p_, {0} * SLAB, 0, 0)", "found('cuMemFree')(p.value, 0, 0, 0)",
                 id="cuGetProcAddress"),
    pytest.param("cu.code('cuMemAllocManaged', p_, {0} * SLAB, 1)", "cu('cuMemFree_v2', p.value)",
                 id="cuMemAllocManaged"),
    pytest.param("cu.code('cuMemAllocAsync', p_, {0} * SLAB, 0)", "cu('cuMemFreeAsync', p.value, 0)",
                 id="cuMemAllocAsync"),
    pytest.param("cu.code('cuMemAllocFromPoolAsync', p_, {0} * SLAB, 0, 0)",
                 "cu('cuMemFreeAsync', p.value, 0)", id="cuMemAllocFromPoolAsync"),
    pytest.param("cu.code('cuMemAllocPitch_v2', p_, ctypes.addressof(pitch), 4096, {0} * SLAB // 4096, 4)",
                 "cu('cuMemFree_v2', p.value)", id="cuMemAllocPitch"),
    pytest.param("cu.code('cuMemCreate', p_, {0} * SLAB, ctypes.addressof(prop), 0)",
                 "cu('cuMemRelease', p.value)", id="cuMemCreate"),
    pytest.param("array(p_, {0})", "cu('cuArrayDestroy', p.value)", id="cuArrayCreate"),
]  # fmt: skip


@pytest.mark.parametrize(("allocate", "free"), WAYS)
def test_every_way_to_allocate_is_bounded(rig: Rig, allocate: str, free: str) -> None:
    offline = rig.tenant("offline", "batch", memory="8Mi")
    offline.run(HELD + FOUND + "\np_ = ctypes.addressof(p)")
    assert offline.run(f"result = {allocate.format(5)}") == OUT_OF_MEMORY, "more than all"
    second = allocate.format(2).replace("p_", "ctypes.addressof(h)")
    for _ in range(3):  # what is freed can be had again
        assert offline.run(f"result = {allocate.format(3)}") == 0
        assert offline.run(f"result = {second}") == OUT_OF_MEMORY
        offline.run(free)
    assert rig.machine.status()["xids"] == [[0, 0]]


def test_a_mapping_holds_the_charge_of_a_released_handle(rig: Rig) -> None:
    """cuMemCreate, map, release: the memory is still there, and so is its charge."""
    offline = rig.tenant("offline", "batch", memory="8Mi")
    offline.run("base = cu.reserve(3 * SLAB); made = cu.create(3 * SLAB); cu.map(base, 3 * SLAB, made)")
    offline.run("cu('cuMemRelease', made); p = ctypes.c_uint64()")
    ask = "result = cu.code('cuMemAlloc_v2', ctypes.byref(p), 2 * SLAB)"
    assert offline.run(ask) == OUT_OF_MEMORY
    offline.run("cu.unmap(base, 3 * SLAB)")
    assert offline.run(ask) == 0


FREE = "result = cu.info()[0] // SLAB"
REFUSED = 999


@pytest.fixture
def refusing(rig: Rig, tmp_path: Path) -> Tenant:
    """A tenant of four slabs with a second libcuda, `other`, that does nothing and answers `answer`."""
    source = Path(__file__).with_name("refusing.c")
    library = compile_program(tmp_path / "libother.so", source, "-shared", "-fvisibility=default")
    offline = rig.tenant("offline", "batch", memory="8Mi")
    offline.run(f"other = ctypes.CDLL({str(library)!r}); answer = ctypes.c_int.in_dll(other, 'answer')")
    offline.run(HELD + f"\nanswer.value = {REFUSED}")
    return offline


def test_a_release_that_is_refused_changes_nothing(refusing: Tenant) -> None:
    refusing.run("base = cu.reserve(SLAB); made = cu.create(SLAB)")
    release = "result = other.cuMemRelease(ctypes.c_uint64(made))"
    for _ in range(3):
        assert refusing.run(release) == REFUSED
        assert refusing.run(FREE) == 3
    refusing.run("cu.map(base, SLAB, made)")
    for _ in range(3):
        assert refusing.run(release) == REFUSED, "the handle, and a mapping that lives on without it"
    refusing.run("cu('cuMemRelease', made)")
    assert refusing.run(FREE) == 3
    refusing.run("cu.unmap(base, SLAB)")
    assert refusing.run(FREE) == 4


def test_a_release_is_over_before_the_driver_gives_the_handle_away(refusing: Tenant) -> None:
    """What another thread creates while the call returns may have the same handle: it must find none."""
    refusing.run("""
        import threading
        made, seen, ctx = cu.create(SLAB), [], ctypes.c_void_p()
        cu('cuCtxGetCurrent', ctypes.byref(ctx))
        def count():
            cu('cuCtxSetCurrent', ctx)
            seen.append(cu.info()[0] // SLAB)
        def look():
            thread = threading.Thread(target=count)
            thread.start(); thread.join()
        keep = ctypes.CFUNCTYPE(None)(look)
        ctypes.c_void_p.in_dll(other, 'during').value = ctypes.cast(keep, ctypes.c_void_p).value
        answer.value = 0
        other.cuMemRelease(ctypes.c_uint64(made)); look()
    """)
    assert refusing.run("result = seen") == [4, 4]


def test_a_reset_of_the_context_frees_what_was_allocated(refusing: Tenant) -> None:
    refusing.run("cu.alloc(SLAB); array(ctypes.addressof(h), 1); kept = cu.create(SLAB)")
    reset = "result = other.cuDevicePrimaryCtxReset_v2(0)"
    assert refusing.run(FREE) == 1
    assert refusing.run(reset) == REFUSED
    assert refusing.run(FREE) == 1
    assert refusing.run(f"answer.value = 0; {reset}") == 0
    assert refusing.run(FREE) == 3, "what no context has, lives on"
    refusing.run("cu('cuMemRelease', kept)")
    assert refusing.run(FREE) == 4


def test_the_arena_and_allocations_share_one_limit(rig: Rig) -> None:
    offline = rig.tenant("offline", "batch", memory="8Mi", slabs=4)
    assert len(offline.run("result = get(3)")) == 3
    ask = "p = ctypes.c_uint64(); result = cu.code('cuMemAlloc_v2', ctypes.byref(p), 2 * SLAB)"
    assert offline.run(ask) == OUT_OF_MEMORY
    offline.run("valve.want(2, False); valve.give_back(2); held.discard(2)")
    wait_for("the slab", lambda: rig.ask()["held"] == {"batch": 2})
    assert wait_for("room", lambda: offline.run(ask) == 0)
    offline.run("valve.want(4, False)")
    wait_for("two looks", lambda: rig.ask()["looks"] >= 3)
    assert rig.ask()["held"] == {"batch": 2}, "what was allocated is taken off what can be granted"


def test_cuda_nvml_and_the_budget_agree(rig: Rig) -> None:
    offline = rig.tenant("offline", "batch", memory="8Mi", slabs=2)
    offline.run("""
        class Info(ctypes.Structure):
            _fields_ = (("total", ctypes.c_uint64), ("free", ctypes.c_uint64), ("used", ctypes.c_uint64))
        nvml = ctypes.CDLL("libnvidia-ml.so.1"); nvml.nvmlInit_v2()
        device = ctypes.c_void_p(); nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
        def told():
            info, total = Info(), ctypes.c_size_t()
            nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(info))
            cu("cuDeviceTotalMem_v2", ctypes.byref(total), 0)
            return [list(cu.info()), [info.free, info.total], [info.total - info.used, total.value]]
    """)
    assert offline.run("result = told()") == [[4 * SLAB, 4 * SLAB]] * 3
    offline.run("get(1); kept = cu.alloc(SLAB)")
    assert offline.run("result = told()") == [[2 * SLAB, 4 * SLAB]] * 3
    online = rig.tenant("online", "chat")
    assert online.run("result = cu.info()")[1] == 64 << 20, "online sees the GPU as it is"


def test_nvml_is_the_judge_of_who_finds_a_way_around(rig: Rig) -> None:
    """By a copy of libcuda that our hooks do not know: NVML sees it, and the process is ended."""
    offline = rig.tenant("offline", "batch", memory="8Mi")
    offline.run("import rm, struct; c = rm.Client(); s, d = c.alloc(c.handle, rm.DEVICE, bytes(56))")
    offline.run("result = c.alloc(d, rm.MEMORY, struct.pack('64xQ', 16 << 20).ljust(128, b'\\0'))")
    killed = wait_for("its end", lambda: rig.events("kill"))
    assert "16 MiB of GPU memory where 8 are allowed" in killed[0]["why"]


def test_torch_gets_whole_slabs_of_the_arena(rig: Rig) -> None:
    offline = rig.tenant("offline", "batch", slabs=8)
    offline.run("""
        lib = ctypes.CDLL(None)
        lib.valve_torch_alloc.restype = ctypes.c_uint64
        lib.valve_torch_alloc.argtypes = (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
        lib.valve_torch_free.argtypes = (ctypes.c_uint64, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
        def make(size):
            got = lib.valve_torch_alloc(size, 0, None)
            return (got - arena.base) / SLAB if got else None
        def drop(slab, size):
            lib.valve_torch_free(at(slab), size, 0, None)
    """)
    assert offline.run("result = [make(SLAB + 1), make(3 * SLAB), make(1), make(2 * SLAB)]") == [0, 2, 5, 6]
    assert offline.run("result = make(1)") is None, "full"
    offline.run("drop(2, 3 * SLAB)")
    assert offline.run("result = [make(2 * SLAB), make(1), make(1), make(9 * SLAB)]") == [2, 4, None, None]
    offline.run("get(7); cu('cuMemsetD8_v2', at(0), ctypes.c_uint8(1), 8 * SLAB)")
    assert rig.machine.status()["xids"] == [[0, 0]], "all of it can be written, granted or not"
