# SPDX-License-Identifier: Apache-2.0
"""Two replicas: one leads; what one leaves undone the other finishes, wherever it was killed."""

from __future__ import annotations

import signal

from operator_rig import LEASE, NAMESPACE, Installed, Replica, eventually, names

SHORT = "--lease-duration=3"
NODES = [f"n{number:02}" for number in range(24)]


def generations(installed: Installed) -> dict[str, int]:
    """Policy generation that each node's settings come from."""
    items = installed.kubectl.get("colonode")["items"]
    return {entry["metadata"]["name"]: entry["spec"]["policy"]["generation"] for entry in items}


def until_it_leads(operator: Replica) -> None:
    eventually("it leads", lambda: operator.metrics()["valve_operator_leader"] == 1)


def until_a_node_has(installed: Installed, generation: int) -> None:
    eventually(f"generation {generation}", lambda: generation in generations(installed).values())


def test_one_leads_and_the_other_takes_over_after_a_kill(installed: Installed) -> None:
    installed.node("n00")
    with installed.replica("first", SHORT) as first:
        eventually("first leads", lambda: installed.holder() == "first")
        with installed.replica("second", SHORT) as second:
            assert first.metrics()["valve_operator_leader"] == 1
            assert second.metrics()["valve_operator_leader"] == 0
            assert second.ready(), "a replica that does not lead is ready: it answers admission"
            first.kill()
            installed.policy("fleet")
            eventually("second does the work", lambda: generations(installed) == {"n00": 1})
            assert installed.holder() == "second"
            lease = installed.kubectl.get("lease", LEASE, "-n", NAMESPACE)
            assert lease["spec"]["leaseTransitions"] >= 1
            eventually("it says so", lambda: second.metrics()["valve_operator_leader"] == 1)


def test_a_leader_that_is_told_to_end_gives_the_lease_up(installed: Installed) -> None:
    with installed.replica("first", "--lease-duration=300") as first:
        eventually("first leads", lambda: installed.holder() == "first")
        assert first.stop() == 0
        assert installed.holder() == ""
    with installed.replica("second", "--lease-duration=300"):
        eventually("second leads without waiting the lease out", lambda: installed.holder() == "second")


def test_killed_again_and_again_in_the_middle_it_still_converges(installed: Installed) -> None:
    """Slowed down to a few writes a second and killed after each handful."""
    for name in NODES:
        installed.node(name)
    slow = (SHORT, "--max-writes-per-second=6")
    with installed.replica("a", *slow) as operator:
        installed.policy("fleet")
        eventually("a part is written", lambda: len(generations(installed)) >= 5)
        operator.kill()
    for generation in (2, 3):
        with installed.replica(f"b{generation}", *slow) as operator:
            until_it_leads(operator)
            installed.policy("fleet", compute={"lease": f"{generation}s"})
            until_a_node_has(installed, generation)
            operator.kill()
    written = generations(installed)
    assert set(written.values()) != {3}, "it was killed in the middle"
    with installed.replica("last", SHORT):
        eventually("all of it", lambda: generations(installed) == dict.fromkeys(NODES, 3))
        eventually(
            "labels", lambda: names(installed.kubectl, "node", "-l", "valve.io/managed=true") == set(NODES)
        )
        ready = eventually("status", lambda: installed.condition("fleet", "Ready"))
        assert "0 of 24 nodes follow" in ready["message"]


def test_an_api_server_that_hangs_costs_the_lead_and_nothing_else(installed: Installed) -> None:
    """A leader that cannot renew must stop writing before another may start; then all goes on."""
    installed.node("n00")
    leads = "valve_operator_leader"
    with installed.replica("a", SHORT) as operator:
        installed.policy("fleet")
        eventually("settings", lambda: generations(installed) == {"n00": 1})
        apiserver = installed.plane.apiserver
        apiserver.signal(signal.SIGSTOP)
        try:
            eventually("it does not lead any more", lambda: operator.metrics()[leads] == 0)
        finally:
            apiserver.signal(signal.SIGCONT)
        eventually("it leads again", lambda: operator.metrics()[leads] == 1)
        installed.policy("fleet", compute={"lease": "1s"})
        eventually("a change still arrives", lambda: generations(installed) == {"n00": 2})
