# SPDX-License-Identifier: Apache-2.0
"""The whole path on every driver layout: captured, paused in the middle of a kernel, resumed where it was."""

from __future__ import annotations

import pytest
from conftest import NewNode
from node import advances, busy, comes_to_stand, idle

import fakenv


@pytest.mark.parametrize("branch", fakenv.BRANCHES)
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
