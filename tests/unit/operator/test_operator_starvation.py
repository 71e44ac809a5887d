# SPDX-License-Identifier: Apache-2.0
"""Starved offline pods: when a pause counts, which pods move, and that a rush does not become a migration."""

from __future__ import annotations

import pytest
from simulated_cluster import Cluster

from valve_api.names import LABEL_STARVED
from valve_operator.actions import Evict
from valve_operator.eviction import EVICTIONS_AT_ONCE
from valve_operator.starvation import PausedSince


def busy_cluster(**second: int) -> Cluster:
    """Pods on a, which is paused; room on b; a delay of 60 s."""
    cluster = Cluster()
    cluster.add_node("a")
    cluster.add_node("b", **second)
    cluster.add_policy("fleet", offline={"starvationDelay": "1m"})
    cluster.settle()
    return cluster


def pass_time(cluster: Cluster, seconds: float, step_s: float = 10) -> None:
    """Reports keep coming, and what is missing is done."""
    end = cluster.now_s + seconds
    while cluster.now_s < end:
        cluster.now_s += step_s
        cluster.settle()


def test_a_pod_paused_for_the_delay_moves_and_its_node_is_marked() -> None:
    cluster = busy_cluster()
    cluster.add_pod("one", "a")
    cluster.report("a", paused=("batch/one",))
    pass_time(cluster, 60)
    assert cluster.evicted == []
    cluster.now_s += 15
    (eviction,) = [action for action in cluster.missing() if isinstance(action, Evict)]
    assert (eviction.namespace, eviction.name) == ("batch", "one")
    assert eviction.uid == cluster.pods["batch/one"]["metadata"]["uid"]
    assert "on a" in eviction.event.message
    for action in cluster.missing():
        cluster.do(action)
    assert cluster.evicted == ["batch/one"]
    assert "valve.io/starved" not in cluster.nodes["b"]["metadata"]["labels"]
    cluster.report("a")
    cluster.settle()
    assert LABEL_STARVED not in cluster.nodes["a"]["metadata"]["labels"]


def test_the_mark_stands_while_the_pod_is_there() -> None:
    cluster = busy_cluster(gib=0)
    cluster.add_pod("one", "a")
    cluster.report("a", paused=("batch/one",))
    pass_time(cluster, 70)
    assert cluster.nodes["a"]["metadata"]["labels"][LABEL_STARVED] == "true"


def test_a_break_between_two_reports_begins_the_delay_anew() -> None:
    """Both reports say paused; the counter of preemptions says that it ran in between."""
    cluster = busy_cluster()
    cluster.add_pod("one", "a")
    cluster.report("a", paused=("batch/one",), preemptions=7)
    pass_time(cluster, 50)
    cluster.report("a", paused=("batch/one",), preemptions=8)
    pass_time(cluster, 50)
    assert cluster.evicted == []
    pass_time(cluster, 30)
    assert cluster.evicted == ["batch/one"]


STAYING = [
    ("no room elsewhere", {"gib": 4}, "Job", "no other node has 8 GiB"),
    ("no controller", {}, "", "has no controller"),
]


@pytest.mark.parametrize(("case", "second", "controller", "sentence"), STAYING, ids=[c[0] for c in STAYING])
def test_a_pod_that_nobody_can_move_stays_and_the_policy_says_so(
    case: str, second: dict[str, int], controller: str, sentence: str
) -> None:
    cluster = busy_cluster(**second)
    cluster.add_pod("one", "a", controller=controller)
    cluster.report("a", paused=("batch/one",))
    pass_time(cluster, 100)
    assert cluster.evicted == []
    starving = cluster.condition("fleet", "Starving")
    assert starving["status"] == "True"
    assert "batch/one" in starving["message"]
    assert sentence in starving["message"]


def test_nothing_moves_to_a_node_that_is_starved_itself_or_cordoned() -> None:
    cluster = busy_cluster()
    cluster.add_node("c")
    cluster.settle()
    cluster.nodes["c"]["spec"]["unschedulable"] = True
    for pod, node in (("one", "a"), ("two", "b")):
        cluster.add_pod(pod, node)
        cluster.report(node, paused=(f"batch/{pod}",))
    pass_time(cluster, 100)
    assert cluster.evicted == []
    cluster.nodes["c"]["spec"]["unschedulable"] = False
    pass_time(cluster, 10)
    assert sorted(cluster.evicted) == ["batch/one", "batch/two"]


def test_room_is_given_away_once() -> None:
    cluster = busy_cluster(gib=12)
    for pod in ("one", "two"):
        cluster.add_pod(pod, "a", gib=8)
    cluster.report("a", paused=("batch/one", "batch/two"))
    cluster.world()
    cluster.now_s += 61
    assert len([action for action in cluster.missing() if isinstance(action, Evict)]) == 1


def test_a_rush_hour_does_not_become_a_migration() -> None:
    cluster = busy_cluster(gib=1000)
    pods = [f"p{number:02}" for number in range(20)]
    for pod in pods:
        cluster.add_pod(pod, "a", gib=1)
    cluster.report("a", paused=tuple(f"batch/{pod}" for pod in pods))
    cluster.world()
    cluster.now_s += 61
    evictions = [action for action in cluster.missing() if isinstance(action, Evict)]
    assert len(evictions) == EVICTIONS_AT_ONCE
    for eviction in evictions:
        cluster.pods[f"batch/{eviction.name}"]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert not [action for action in cluster.missing() if isinstance(action, Evict)], (
        "the first are on their way"
    )


def test_an_agent_that_starts_again_counts_as_a_break() -> None:
    table = PausedSince()
    gpu = {"id": "g", "paused": True, "preemptions": 9, "tenants": [{"name": "b/p", "workload": "offline"}]}
    table.observe("a", {"gpus": [gpu]}, 0)
    table.observe("a", {"gpus": [gpu]}, 50)
    assert [*table.longer_than("a", 40, 50)] == [("b/p", 50)]
    table.observe("a", {"gpus": [gpu | {"preemptions": 0}]}, 60)
    assert [*table.longer_than("a", 40, 99)] == []


def test_online_tenants_and_running_ones_are_not_counted() -> None:
    table = PausedSince()
    tenants = [
        {"name": "b/on", "workload": "online"},
        {"name": "b/runs", "workload": "offline", "busy": True},
    ]
    table.observe("a", {"gpus": [{"id": "g", "paused": True, "tenants": tenants}]}, 0)
    assert table.by_node == {}
