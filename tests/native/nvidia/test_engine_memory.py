# SPDX-License-Identifier: Apache-2.0
"""What the engine plugins do with a GPU's arena, on the fake driver: place the KV cache, wait for its first
slabs, lose blocks under a running kernel, hear of it before outputs are believed.

Everything is the product's but torch: the KV cache is written by kernels and memsets at device addresses.
"""

from __future__ import annotations

from memory_rig import SLAB, Rig, Tenant

PLUGIN = """
from valve_runtime import elastic, geometry
from valve_runtime.torch_device import mismatch
PAGE = SLAB // 4
def cache(blocks, slabs=8):
    global pool, kv
    kv = valve.place(blocks * PAGE)
    region = geometry.Region(0, 1, 0, PAGE, PAGE)
    pool = elastic.ElasticPool(geometry.build([region], blocks, arena.slab_bytes, arena.slabs), pinned=(0,))
    elastic.await_pinned(valve, pool, elastic.DemandSettings())
    elastic.Ledger(valve, pool).publish([("r", 10, range(1, blocks // 2))])
def want(blocks):
    demand = elastic.Demand(valve, pool, elastic.DemandSettings())
    end = time.monotonic() + 20
    while pool.usable < blocks and time.monotonic() < end:
        demand.raise_to(blocks, time.monotonic(), urgent=False)
        pool.apply(elastic.drain_events(valve))
        time.sleep(0.002)
    return pool.usable
def write(block, value):
    cu("cuMemsetD32_v2", kv + block * PAGE, ctypes.c_uint(value), PAGE // 4)
def read(block):
    return cu.read64(kv + block * PAGE) & 0xffffffff
def drain():
    change = pool.apply(elastic.drain_events(valve))
    return sorted(change.lost)
"""


def engine(rig: Rig, slabs: int = 8) -> Tenant:
    tenant = rig.tenant("offline", "batch", slabs=slabs)
    tenant.run(PLUGIN)
    return tenant


def test_the_engine_knows_which_device_its_agent_serves(rig: Rig) -> None:
    offline = engine(rig)
    assert offline.run("result = valve.device()") == "nvidia"
    assert offline.run("result = mismatch(valve.device(), 'cuda')") == ""
    assert "serves the nvidia device" in offline.run("result = mismatch(valve.device(), 'cpu')")


def test_the_kv_cache_lies_at_the_start_and_keeps_its_size(rig: Rig) -> None:
    """Not rounded up, not moved; what was there is neither read nor written: no fill is launched."""
    offline = engine(rig)
    offline.run("get(2); put(0, 0xA1); put(1, 0xA2)")
    odd = 5 * SLAB + 4096
    assert offline.run(f"kv = valve.place({odd}); result = kv - arena.base") == 0
    assert offline.run("result = [see(0), see(1)]") == [0xA1, 0xA2]
    assert offline.run("other = valve.place(1); result = other - arena.base") == 6 * SLAB, (
        "the next free slab"
    )
    offline.run(f"valve.unplace(kv, {odd}); valve.unplace(other, 1)")
    assert offline.run("result = valve.place(8 * SLAB) - arena.base") == 0, "all of it, again"
    said = offline.run(
        "try:\n    valve.place(1); result = ''\nexcept _lib.ArenaDenied as error: result = str(error)"
    )
    assert "no room" in said


def test_the_first_slabs_are_there_before_the_engine_runs(rig: Rig) -> None:
    offline = engine(rig)
    offline.run("cache(32)")
    assert offline.run("result = [pool.pinned_slabs <= pool.held, pool.usable >= 3]") == [True, True]
    offline.run("write(0, 77)")
    assert offline.run("result = read(0)") == 77
    assert offline.run("result = want(20)") >= 20
    offline.run("for block in range(1, 21): write(block, 100 + block)")
    assert offline.run("result = [read(block) for block in range(1, 21)]") == [100 + b for b in range(1, 21)]


def test_losses_are_known_once_the_outputs_of_the_step_are_there(rig: Rig) -> None:
    """A reclaim under a running kernel: this process is not stopped, so a look before the kernel's end sees
    nothing of a reclaim that is still to come; a look after it sees all, because a slab is marked lost before
    it is taken. The engine plugins wait first and drain then."""
    offline = engine(rig)
    offline.run("cache(32); want(27); get(7)")
    offline.run("for block in range(1, 28): write(block, 100 + block)")
    rig.start_kernel(offline, 7)
    offline.run("early = drain()")
    online = rig.take(8, 5)
    online.run("for s in held: put(s, 0xB0 + s)")
    offline.run("cu.synchronize(); lost_blocks = drain(); again = drain()")
    lost = offline.run("result = lost_blocks")
    assert offline.run("result = [early, again]") == [[], []]
    assert len(lost) >= 16, "four slabs' worth of blocks at least"
    assert not any(block in lost for block in range(4)), "the null block's slab is pinned"
    kept = [block for block in range(4, 28) if block not in lost]
    assert offline.run(f"result = [pool.is_usable(block) for block in {lost}]") == [False] * len(lost)
    assert offline.run(f"result = [pool.is_usable(block) for block in {kept}]") == [True] * len(kept)
    offline.run(f"for block in {lost}: write(block, 0xDEAD)")
    assert online.run("result = [see(s) for s in sorted(held)]") == [
        0xB0 + s for s in online.run("result = sorted(held)")
    ]
    status = rig.machine.status()
    assert (status["remaps_while_running"], status["xids"]) == (0, [[0, 0]])


def test_an_online_engine_is_granted_before_it_uses(rig: Rig) -> None:
    online = rig.tenant("online", "chat", slabs=8)
    online.run(PLUGIN)
    online.run("valve.busy(); cache(32)")
    assert online.run("result = want(27)") >= 27
    online.run("for block in range(1, 28): write(block, 200 + block)")
    assert online.run("result = [read(block) for block in range(1, 28)]") == [200 + b for b in range(1, 28)]
    online.run("valve.idle(0)")
