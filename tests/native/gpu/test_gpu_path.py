# SPDX-License-Identifier: Apache-2.0
"""The whole path on every driver layout: captured, paused in the middle of a kernel, resumed where it was."""

from __future__ import annotations

import time

import pytest
from gpu_node import NewNode, advances, busy, comes_to_stand, idle

import fakenv


def test_many_pauses_change_no_result(new_node: NewNode) -> None:
    """A checksum over memory, interrupted all along, is bit-equal to one that was left alone."""
    node = new_node()
    victim = node.victim(launch=False)
    victim.run("""
        p, sums = cu.alloc(8 << 20), cu.host(4096)
        cu("cuMemsetD32_v2", p, driver_api.ctypes.c_uint(0x9E3779B9), 2 << 20)
        def checksum(rounds):
            cu.launch("checksum", p, 8 << 20, rounds, sums)
            cu.synchronize()
            return cu.read64(sums)
    """)
    expected = victim.run("result = checksum(60)")
    engine = node.engine()
    node.agent.wait_event("resume")
    victim.start("result = checksum(60)")
    for _ in range(30):
        busy(engine)
        idle(engine)
        time.sleep(0.03)
    assert victim.finish() == expected
    assert sum(c["evictions"] for c in node.channels()) > 0, "it was interrupted"
    assert node.machine.status()["evict_timeouts"] == 0
    assert node.machine.status()["xids"] == [[0, 0]]


@pytest.mark.parametrize("branch", fakenv.LAYOUTS)
def test_a_kernel_stops_for_online_and_goes_on_where_it_was(new_node: NewNode, branch: str) -> None:
    node = new_node(machine={"branch": branch})
    victim = node.victim()
    engine = node.engine()
    busy(engine)
    assert comes_to_stand(victim)
    written = victim.run("result = stamp()")[1]
    assert [c["state"] for c in node.channels()].count("parked") == 1, "stopped in the middle of its kernel"
    assert all(c["disabled"] for c in node.channels()), "all channels of the compute group are disabled"
    assert not any(c["disabled"] for c in node.channels(None) if c["engine"] != 1), "copies may go on"
    idle(engine)
    assert advances(victim)
    assert victim.run("result = stamp()")[1] > written
    route = node.agent.status()["route"]
    assert (route["route"], route["branch"], route["commit"]) == ("agent", branch, "none")
