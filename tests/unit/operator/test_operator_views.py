# SPDX-License-Identifier: Apache-2.0
"""Views: what is read out of objects, as a table of the places where reading can go wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from simulated_cluster import Cluster

from valve_operator import views

AMOUNTS = [("12", 12), ("1k", 1000), ("1Ki", 1024), ("12e3", 12000), (7, 7), (None, 0)]


@pytest.mark.parametrize(("written", "whole"), AMOUNTS)
def test_amounts_of_an_extended_resource(written: Any, whole: int) -> None:
    cluster = Cluster()
    cluster.add_node("a")
    node = cluster.nodes["a"]
    node["status"]["allocatable"]["valve.io/offline-memory-gib"] = written
    view = views.node_view(node)
    assert view is not None
    assert view.offline_gib == whole


def test_a_node_without_any_status_is_not_ready() -> None:
    view = views.node_view({"metadata": {"name": "a", "uid": "u"}})
    assert view is not None
    assert (view.ready, view.schedulable, view.offline_gib) == (False, True, 0)


NO_TENANTS: list[tuple[str, dict[str, Any]]] = [
    ("online", {"metadata": {"labels": {"valve.io/workload": "online"}, "annotations": {}}}),
    ("only the annotation: admission has not seen it", {"metadata": {"labels": {}}}),
    ("succeeded", {"status": {"phase": "Succeeded"}}),
    ("failed", {"status": {"phase": "Failed"}}),
]


@pytest.mark.parametrize(("case", "change"), NO_TENANTS, ids=[case[0] for case in NO_TENANTS])
def test_pods_that_are_no_offline_tenants(case: str, change: dict[str, Any]) -> None:
    cluster = Cluster()
    cluster.add_pod("one", "a")
    pod = cluster.pods["batch/one"]
    assert views.pod_view(pod) is not None
    for part, fields in change.items():
        pod[part] = {**pod[part], **fields}
    assert views.pod_view(pod) is None


def test_a_policy_of_another_version_is_refused_and_says_why() -> None:
    cluster = Cluster()
    cluster.add_policy("p", nodeSelector={"a": "b"}, priority=3)
    raw = copy.deepcopy(cluster.policies["p"])
    raw["spec"]["fromTheFuture"] = True
    view = views.policy_view(raw)
    assert view is not None
    assert view.settings is None
    assert "spec.fromTheFuture" in view.problem
    assert (view.selector, view.priority) == ({"a": "b"}, 3), "it keeps its place"


def test_an_agent_of_another_version_is_read_as_far_as_it_goes() -> None:
    status = {
        "gpus": [{"id": "g", "preemptLatency": None, "unheard": 1}],
        "conditions": [{"type": "Odd", "status": "True"}],
    }
    report = views.report_view(status)
    assert (report.gpus, report.worst_p99_us, report.ready) == (1, 0, False)
    assert report.why == "no agent has reported yet"
