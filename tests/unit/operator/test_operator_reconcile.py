# SPDX-License-Identifier: Apache-2.0
"""reconcile: what follows from policies, nodes and reports, and what holds for every world."""

from __future__ import annotations

import copy
import random
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_cluster import NOW, Cluster

from valve_api.names import LABEL_MANAGED
from valve_api.node import ColocationNode
from valve_operator.actions import WriteNode, WriteStatus, key_of


def two_nodes() -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", gpu="yes")
    cluster.add_node("b")
    return cluster


def test_a_policy_reaches_the_nodes_it_selects_and_no_other() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet", nodeSelector={"gpu": "yes"})
    cluster.settle()
    assert set(cluster.colonodes) == {"a"}
    assert set(cluster.daemonsets) == {"valve-agent", "valve-device-plugin"}
    assert cluster.nodes["a"]["metadata"]["labels"] == {"gpu": "yes", LABEL_MANAGED: "true"}
    assert cluster.nodes["b"]["metadata"]["labels"] == {}
    node = cluster.colonodes["a"]
    ColocationNode.model_validate({"apiVersion": "valve.io/v1alpha1", "kind": "ColocationNode", **node})
    assert node["spec"]["policy"] == {"name": "fleet", "generation": 1}
    assert node["metadata"]["ownerReferences"][0]["uid"] == cluster.nodes["a"]["metadata"]["uid"]


def test_the_daemonsets_run_on_managed_nodes_and_belong_to_the_templates() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    made = cluster.daemonsets["valve-agent"]
    selector = made["spec"]["template"]["spec"]["nodeSelector"]
    assert selector == {"kubernetes.io/os": "linux", LABEL_MANAGED: "true"}
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("ConfigMap", "valve-node", "u-owner")
    assert "blockOwnerDeletion" not in owner
    assert "finalizers" not in made["metadata"]


def test_when_the_last_policy_goes_everything_goes() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    del cluster.policies["fleet"]
    cluster.settle()
    assert not cluster.colonodes
    assert not cluster.daemonsets
    assert all(LABEL_MANAGED not in node["metadata"]["labels"] for node in cluster.nodes.values())


def test_a_policy_being_deleted_counts_as_gone() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.policies["fleet"]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    cluster.settle()
    assert not cluster.colonodes


OVERLAPS: list[tuple[str, dict[str, dict[str, Any]], str]] = [
    ("the older wins", {"new": {"created": 2}, "old": {"created": 1}}, "old"),
    ("priority beats age", {"new": {"created": 2, "priority": 1}, "old": {"created": 1}}, "new"),
    ("a negative priority yields", {"old": {"created": 1, "priority": -1}, "new": {"created": 2}}, "new"),
    ("of the same second, the first by name", {"b": {"created": 1}, "a": {"created": 1}}, "a"),
]


@pytest.mark.parametrize(("case", "policies", "winner"), OVERLAPS, ids=[case[0] for case in OVERLAPS])
def test_overlap(case: str, policies: dict[str, dict[str, Any]], winner: str) -> None:
    cluster = two_nodes()
    for name, given_ in policies.items():
        cluster.add_policy(name, **given_)
    cluster.settle()
    assert {node["spec"]["policy"]["name"] for node in cluster.colonodes.values()} == {winner}
    (loser,) = set(policies) - {winner}
    lost = cluster.condition(loser, "Overlapping")
    assert lost["status"] == "True"
    assert f"{winner} on 2" in lost["message"]
    assert "spec.priority" in lost["message"]
    assert cluster.condition(loser, "Ready")["reason"] == "NoNodes"
    assert cluster.condition(winner, "Overlapping")["status"] == "False"


def test_a_refused_policy_keeps_its_nodes_as_they_are() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet", created=1)
    cluster.add_policy("later", created=2)
    cluster.settle()
    before = cluster.colonodes["a"]["spec"]
    cluster.change_policy("fleet", memory={"slabSize": "3Mi"})
    cluster.settle()
    assert cluster.colonodes["a"]["spec"] == before
    refused = cluster.condition("fleet", "Accepted")
    assert refused["status"] == "False"
    assert "spec.memory.slabSize" in refused["message"]
    assert set(cluster.daemonsets) == {"valve-agent", "valve-device-plugin"}


def test_the_only_policy_refused_leaves_everything_running() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.change_policy("fleet", memory={"slabSize": "3Mi"})
    cluster.settle()
    assert set(cluster.daemonsets) == {"valve-agent", "valve-device-plugin"}
    assert set(cluster.colonodes) == {"a", "b"}
    assert cluster.nodes["a"]["metadata"]["labels"][LABEL_MANAGED] == "true"


def test_a_node_made_again_under_its_name_owns_its_settings() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.add_node("b")
    cluster.settle()
    (owner,) = cluster.colonodes["b"]["metadata"]["ownerReferences"]
    assert owner["uid"] == cluster.nodes["b"]["metadata"]["uid"]


def test_settings_of_an_older_policy_do_not_count_as_followed() -> None:
    """The policy has changed, and the write to this node has not been done yet."""
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    for name in ("a", "b"):
        cluster.report(name)
    cluster.settle()
    cluster.change_policy("fleet", compute={"lease": "1s"})
    (status,) = [action for action in cluster.missing() if isinstance(action, WriteStatus)]
    assert status.status["readyNodes"] == 0


def test_a_policy_refused_from_the_start_installs_nothing() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet", memory={"slabSize": "3Mi"})
    cluster.settle()
    assert not cluster.colonodes
    assert not cluster.daemonsets
    assert LABEL_MANAGED not in cluster.nodes["a"]["metadata"]["labels"]


def test_status_sums_up_what_the_agents_say() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    assert cluster.condition("fleet", "Ready")["reason"] == "Progressing"
    assert "a: no agent has reported yet" in cluster.condition("fleet", "Ready")["message"]
    for name in ("a", "b"):
        cluster.report(name, preemptions=3)
    cluster.settle()
    status = cluster.policies["fleet"]["status"]
    figures = ("nodes", "readyNodes", "gpus", "worstP99Us", "preemptions", "reclaims")
    assert [status[name] for name in figures] == [2, 2, 2, 400, 6, 2]
    assert cluster.condition("fleet", "Ready")["status"] == "True"
    assert {c["observedGeneration"] for c in status["conditions"]} == {1}


LAGS: list[tuple[str, dict[str, Any], str]] = [
    ("the node is down", {"node": "False"}, "the node is not ready"),
    ("the agent says no", {"ready": False}, "the driver is missing"),
    ("the agent is silent", {"age_s": 91}, "silent since 2026-01-01T11:58:29Z"),
    ("an older generation", {"observed": 0}, "not taken over the newest settings"),
]


@pytest.mark.parametrize(("case", "change", "sentence"), LAGS, ids=[case[0] for case in LAGS])
def test_a_node_that_does_not_follow_is_named_with_its_reason(
    case: str, change: dict[str, Any], sentence: str
) -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.report("a", ready=change.get("ready", True))
    cluster.report("b")
    status = cluster.colonodes["a"]["status"]
    status["reportedAt"] = (NOW - timedelta(seconds=change.get("age_s", 30))).isoformat()
    status["observedGeneration"] = change.get("observed", 1)
    cluster.nodes["a"]["status"]["conditions"][0]["status"] = change.get("node", "True")
    cluster.settle()
    ready = cluster.condition("fleet", "Ready")
    assert ready["status"] == "False"
    assert sentence in ready["message"]
    assert ready["message"].startswith("1 of 2 nodes follow; a: ")


def test_a_changed_policy_is_written_to_every_node_and_reported_as_progress() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    for name in ("a", "b"):
        cluster.report(name)
    cluster.settle()
    cluster.change_policy("fleet", compute={"lease": "1s"})
    written = [action for action in cluster.missing() if isinstance(action, WriteNode)]
    assert [action.name for action in written] == ["a", "b"]
    cluster.settle()
    assert cluster.colonodes["a"]["spec"]["compute"]["lease"] == "1s"
    assert cluster.condition("fleet", "Ready")["reason"] == "Progressing"


def test_a_hand_that_changes_a_node_is_undone() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.colonodes["a"]["spec"]["compute"]["lease"] = "20ms"
    cluster.nodes["b"]["metadata"]["labels"].pop(LABEL_MANAGED)
    assert {key_of(action) for action in cluster.missing()} == {("WriteNode", "a"), ("LabelNode", "b")}


def test_events_tell_a_change_once() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")

    def told() -> list[str]:
        """Events of the rounds until nothing is missing."""
        reasons: list[str] = []
        for _ in range(5):
            for action in cluster.missing():
                cluster.do(action)
                if isinstance(action, WriteStatus):
                    reasons += [event.reason for event in action.events]
        return reasons

    assert told() == ["NotReady"]
    for name in ("a", "b"):
        cluster.report(name)
    assert told() == ["Ready"]
    cluster.report("a", preemptions=5)
    assert told() == []
    cluster.change_policy("fleet", memory={"slabSize": "3Mi"})
    assert told() == ["NotAccepted", "NotReady"]


def test_figures_alone_are_not_urgent() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.report("a")
    (action,) = cluster.missing()
    assert isinstance(action, WriteStatus)
    assert not action.urgent
    cluster.report("b")
    (action,) = cluster.missing()
    assert isinstance(action, WriteStatus)
    assert action.urgent, "Ready turned True"


def test_the_time_of_a_condition_changes_only_with_its_status() -> None:
    cluster = two_nodes()
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.now += timedelta(hours=1)
    cluster.report("a")
    cluster.settle()
    assert cluster.condition("fleet", "Ready")["lastTransitionTime"] == "2026-01-01T12:00:00Z"
    cluster.report("b")
    cluster.settle()
    assert cluster.condition("fleet", "Ready")["lastTransitionTime"] == "2026-01-01T13:00:00Z"


SELECTORS = st.sampled_from([{}, {"gpu": "yes"}, {"gpu": "no"}, {"gpu": "yes", "pool": "1"}])
SPECS = st.fixed_dictionaries(
    {"nodeSelector": SELECTORS, "priority": st.integers(-1, 1)},
    optional={
        "memory": st.sampled_from([{"slabSize": "2Mi"}, {"slabSize": "3Mi"}]),  # the second is refused
        "compute": st.just({"lease": "1s"}),
    },
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    cluster = Cluster()
    for number in range(draw(st.integers(0, 4))):
        labels = draw(
            st.fixed_dictionaries({}, optional={"gpu": st.sampled_from(["yes", "no"]), "pool": st.just("1")})
        )
        cluster.add_node(f"n{number}", **labels)
    for number, spec in enumerate(draw(st.lists(SPECS, max_size=3))):
        cluster.add_policy(f"p{number}", draw(st.integers(0, 2)), **spec)
    return cluster


@settings(deadline=None)
@given(clusters(), st.integers(0, 1000), st.data())
def test_an_operator_killed_between_any_two_actions_converges(cluster: Cluster, seed: int, data: Any) -> None:
    """Any subset of the actions, in any order, then another replica: the end is the same as without "
    "the kill."""
    calm, killed = copy.deepcopy(cluster), cluster
    calm.settle()
    actions = killed.missing()
    random.Random(seed).shuffle(actions)
    for action in actions[: data.draw(st.integers(0, len(actions)))]:
        killed.do(action)
    again = {key_of(action) for action in killed.missing()}
    assert again <= {key_of(action) for action in actions}, "half-done work asks for nothing new"
    killed.settle()
    specs = lambda c: {name: node["spec"] for name, node in c.colonodes.items()}  # noqa: E731
    labels = lambda c: {name: node["metadata"]["labels"] for name, node in c.nodes.items()}  # noqa: E731
    assert specs(killed) == specs(calm)
    assert labels(killed) == labels(calm)
    assert set(killed.daemonsets) == set(calm.daemonsets)
    assert {n: p.get("status") for n, p in killed.policies.items()} == {
        n: p.get("status") for n, p in calm.policies.items()
    }


@settings(deadline=None)
@given(clusters())
def test_every_node_has_at_most_one_policy_and_all_that_selects_it_is_accounted_for(cluster: Cluster) -> None:
    cluster.settle()
    for name, policy in cluster.policies.items():
        selector = policy["spec"]["nodeSelector"]
        selected = [
            node
            for node, raw in cluster.nodes.items()
            if selector.items() <= raw["metadata"]["labels"].items()
        ]
        lost = cluster.condition(name, "Overlapping")["message"]
        counted = [int(word.strip(",;")) for word in lost.split() if word.strip(",;").isdigit()]
        assert policy["status"]["nodes"] + sum(counted) == len(selected)
