# SPDX-License-Identifier: Apache-2.0
"""GPU memory from the agent to a tenant and back, on the fake driver, with a real agent and libvalve."""

from __future__ import annotations

from memory_rig import Rig

BRANCHES = ("535", "550", "570", "580", "595")


def test_memory_moves_from_offline_to_online_and_back(rig: Rig) -> None:
    """The whole way: grant, use, reclaim under a stopped process, quarantine, no leak, restore."""
    offline = rig.tenant("offline", "batch", slabs=8)
    assert offline.run("result = get(7)") == list(range(7)), "all but the reservation"
    offline.run("for s in held: put(s, 0xA0 + s)")
    assert offline.run("result = [see(s) for s in sorted(held)]") == [0xA0 + s for s in range(7)]

    online = rig.tenant("online", "chat", slabs=8)
    offline.stop()
    assert len(online.run("result = get(4, urgent=True)")) == 4, "taken from a process that is stopped"
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

    online.run("for s in sorted(held)[:3]: valve.give_back(s)\nheld -= set(sorted(held)[:3])")
    again = offline.run("lost.clear(); result = get(6)")
    assert len(again) == 6
    back = sorted(set(again) & set(lost))
    assert len(back) == 3
    assert offline.run(f"result = [see(s) for s in {back}]") == [0] * 3, "nothing of online's is seen"
    assert rig.machine.status()["remaps_while_running"] == 0
    assert rig.machine.status()["xids"] == [[0, 0]]
