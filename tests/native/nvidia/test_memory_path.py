# SPDX-License-Identifier: Apache-2.0
"""GPU memory from the agent to a tenant and back, on the fake driver, with a real agent and libvalve."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

import pytest
from memory_rig import SLAB, Rig, wait_for

import fakenv
from fakenv import FakeNvError

BY_AGENT, BY_TENANT = 1, 2


@pytest.mark.parametrize("branch", fakenv.LAYOUTS)
@pytest.mark.parametrize("route", [BY_AGENT, BY_TENANT], ids=["below libcuda", "by libcuda"])
def test_memory_moves_from_offline_to_online_and_back(
    new_rig: Callable[..., Rig], branch: str, route: int
) -> None:
    """Grant, use, reclaim (below libcuda from a stopped process), quarantine, no leak, restore."""
    rig = new_rig(branch=branch, routes=[route])
    offline = rig.tenant("offline", "batch", slabs=8)
    (event,) = wait_for("the event", lambda: rig.events("memory-route"))
    assert event["route"] == ("by_agent" if route == BY_AGENT else "by_tenant")
    assert offline.run("result = get(7)") == list(range(7)), "all but the reservation"
    offline.run("for s in held: put(s, 0xA0 + s)")
    assert offline.run("result = [see(s) for s in sorted(held)]") == [0xA0 + s for s in range(7)]

    online = rig.tenant("online", "chat", slabs=8)
    if route == BY_AGENT:
        offline.stop()
    assert len(online.run("result = get(4, urgent=True)")) == 4, "taken at once"
    assert online.run("result = [see(s) for s in sorted(held)]") == [0] * 4, "nothing of offline's is seen"
    online.run("for s in held: put(s, 0xB0 + s)")
    offline.go_on()
    offline.run("poll()")
    lost = offline.run("result = sorted(lost)")
    assert len(lost) == 4
    offline.run("for s in lost: put(s, 0xDEAD)")
    assert online.run("result = [see(s) for s in sorted(held)]") == [0xB0 + s for s in range(4)]
    assert offline.run("result = [see(s) for s in sorted(held)]") == offline.run(
        "result = [0xA0 + s for s in sorted(held)]"
    )

    online.run("time.sleep(0.05)")  # its channels are idle a moment after its last kernel's end
    online.run("for s in sorted(held)[:3]: valve.give_back(s)\nheld -= set(sorted(held)[:3])")
    again = offline.run("lost.clear(); result = get(6)")
    assert len(again) == 6
    back = sorted(set(again) & set(lost))
    assert len(back) == 3
    assert offline.run(f"result = [see(s) for s in {back}]") == [0] * 3, "nothing of online's is seen"
    assert rig.machine.status()["remaps_while_running"] == 0
    assert rig.machine.status()["xids"] == [[0, 0]]


def test_a_kernel_that_is_taken_from_in_the_middle_meets_no_fault(rig: Rig) -> None:
    """Reclaim under a kernel that walks all of its memory: it ends, without an Xid, and only what it lost
    is not as it would be."""
    offline = rig.tenant("offline", "batch", slabs=8)
    offline.run("get(7)")
    rig.start_kernel(offline, 7)
    online = rig.take(8, 5)
    online.run("for s in held: put(s, 0xB0 + s)")
    offline.run("poll(); cu.synchronize()")
    assert online.run("result = [see(s) for s in sorted(held)]") == [0xB0 + s for s in range(5)]
    status = rig.machine.status()
    assert (status["remaps_while_running"], status["xids"]) == (0, [[0, 0]])
    assert any(c["evictions"] for c in status["channels"]), "it was in the middle"


def test_a_remap_of_a_process_that_is_not_evicted_is_refused(rig: Rig) -> None:
    offline = rig.tenant("offline", "batch", slabs=8)
    offline.run("get(4); put(0, 77)")
    assert rig.ask("discard without a hold") == "NotEvicted"
    assert rig.ask("grant without a hold") == "NotEvicted"
    assert offline.run("result = see(0)") == 77


def test_a_touch_of_unmapped_memory_would_be_caught(rig: Rig) -> None:
    """What a reclaim that only unmaps would do: the fake notices, so the tests above have power."""
    offline = rig.tenant("offline", "batch", slabs=8)
    offline.run("get(2); cu.launch('touch_pages', arena.base, SLAB, 4096, 7, 1); cu.synchronize()")
    assert rig.ask("unmap slab 0") == "0x0"
    offline.run("cu.launch('touch_pages', arena.base, SLAB, 4096, 7, 1)")
    assert offline.run("result = cu.code('cuCtxSynchronize')") == 700
    assert rig.machine.status()["xids"] == [[31, 1]]


def test_without_a_way_to_take_memory_back_there_is_none(new_rig: Callable[..., Rig]) -> None:
    """UVM takes nothing from the agent, and libcuda waits for a paused context (the open question E8)."""
    rig = new_rig(routes=[BY_TENANT])
    rig.machine.ctl("unmap-syncs", 1)
    offline = rig.tenant("offline", "batch")
    with pytest.raises(FakeNvError, match=re.escape("libcuda does not remap while this process is paused")):
        offline.run("opened(8)")
    assert offline.run("result = cu.code('cuCtxSynchronize')") == 0, "and it lives"
    assert rig.ask()["standing"] == 0, "nobody is left paused"


#                          slabs  what the sentence says
REFUSALS = [
    pytest.param(9, "more than the 16Mi that this tenant may have", id="more than the tenant's limit"),
    pytest.param(2**40, "more than the 16Mi that this tenant may have", id="absurd"),
]


@pytest.mark.parametrize(("slabs", "sentence"), REFUSALS)
def test_arenas_that_are_refused(rig: Rig, slabs: int, sentence: str) -> None:
    offline = rig.tenant("offline", "batch")
    with pytest.raises(FakeNvError, match=sentence):
        offline.run(f"opened({slabs})")
    assert offline.run("result = opened(8)"), "and may be asked for again"


def test_a_process_that_dies_gives_its_memory_back(rig: Rig) -> None:
    wait_for("slabs made ahead", lambda: rig.ask()["ready"] >= 8)
    before = rig.ask()
    offline = rig.tenant("offline", "batch", slabs=8)
    offline.run("get(4); [put(s, 5) for s in held]; kept = cu.alloc(3 * SLAB)")
    offline.run("cu.launch('spin_us', 60000000)")
    offline.kill()
    wait_for("its slabs", lambda: rig.ask()["free"] == 8)
    wait_for("them to be ready", lambda: rig.ask()["ready"] >= 8)
    wait_for("its files to be closed", lambda: rig.ask()["fds"] <= before["fds"])
    wait_for("its own memory", lambda: rig.machine.status()["used_bytes"] == [rig.ask()["ready"] * SLAB])
    online = rig.tenant("online", "chat", slabs=8)
    assert online.run("get(8); result = [see(s) for s in sorted(held)]") == [0] * 8


def test_tenants_live_through_the_death_of_the_agent(new_rig: Callable[..., Rig]) -> None:
    """Their memory lives by its mappings; the next agent knows of it, takes it back and makes it anew."""
    rig = new_rig(fill=False)
    offline = rig.tenant("offline", "batch", slabs=8)
    online = rig.tenant("online", "chat", slabs=8)
    offline.run("get(4); [put(s, 0xA0 + s) for s in held]")
    online.run("get(2); [put(s, 0xB0 + s) for s in held]")
    rig.end_agent(signal.SIGKILL)
    assert online.run("result = [see(s) for s in sorted(held)]") == [0xB0, 0xB1], "online goes on"
    rig.start_agent()
    wait_for("both", lambda: rig.ask()["held"] == {"batch": 4, "chat": 2})
    assert offline.run("result = [see(s) for s in sorted(held)]") == [0xA0 + s for s in range(4)]
    assert rig.ask()["orphans"] == 6
    assert len(online.run("result = get(6, urgent=True)")) == 6, "2 were free, the rest is taken from offline"
    assert online.run("result = [see(s) for s in sorted(held)]") == [0xB0, 0xB1, 0, 0, 0, 0]
    assert len(offline.run("poll(); result = lost")) >= 2
    online.run("for s in list(held): valve.give_back(s)")
    wait_for("offline to have what it wanted", lambda: rig.ask()["held"] == {"batch": 4, "chat": 0})
    assert offline.run("result = [see(s) for s in get(4)[:2]]") is not None
    assert rig.machine.status()["used_bytes"][0] <= 12 * SLAB, "8 slabs, 2 quarantines, 2 that nobody has yet"


def test_a_gpu_that_is_lost_does_not_take_the_agent_along(rig: Rig) -> None:
    online = rig.tenant("online", "chat", slabs=8)
    online.run("get(8); put(0, 1)")
    rig.machine.ctl("lost", 0, 1)
    online.run("valve.want(7, True); valve.give_back(0); held.discard(0)")
    wait_for("the slab", lambda: rig.ask()["free"] == 1)
    online.run("valve.want(8, True)")
    failed = wait_for("the failure", lambda: rig.events("grant-failed"))
    assert "cuMemsetD8Async" in failed[0]["why"] or "cuCtxSynchronize" in failed[0]["why"], failed
    assert rig.ask()["standing"] == 0
