# SPDX-License-Identifier: Apache-2.0
"""Admission through a real API server: the documented table."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from operator_rig import Installed, as_kubernetes_wants, create

from e2e.cluster.kubectl import Refused
from valve_operator.cases import CASES, OFFLINE, ONLINE, Case


@pytest.fixture(scope="module")
def served(chart_on_a_plane: Installed) -> Iterator[Installed]:
    with chart_on_a_plane.replica("admission"):
        yield chart_on_a_plane


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_the_documented_table(served: Installed, case: Case) -> None:
    pod = as_kubernetes_wants(case)
    if isinstance(case.outcome, dict):
        made = create(served, pod)
        asked = {c["name"]: c["resources"] for c in made["spec"]["containers"]}
        assert asked[case.engine]["limits"] == asked[case.engine]["requests"] == case.outcome
        return
    with pytest.raises(Refused) as refusal:
        create(served, pod)
    for sentence in case.outcome:
        assert sentence in refusal.value.sentence


@pytest.mark.parametrize(("annotations", "number"), [(ONLINE, 100_000), (OFFLINE, -100_000)])
def test_the_priority_is_the_class_s(served: Installed, annotations: dict[str, str], number: int) -> None:
    """The API server gave the default class's number before the webhook saw the pod."""
    spec = create(served, as_kubernetes_wants(Case("", annotations, {})))["spec"]
    assert spec["priorityClassName"] == f"valve-{annotations['workload']}"
    classes = served.kubectl.get("priorityclass", spec["priorityClassName"])
    assert spec["priority"] == classes["value"]
    assert spec["preemptionPolicy"] == classes["preemptionPolicy"]
    assert (spec["priority"] > 0) == (number > 0)


def test_a_pod_without_annotations_never_meets_valve(served: Installed) -> None:
    pod = as_kubernetes_wants(Case("", {}, {}))
    assert "valve" not in json.dumps(create(served, pod)["spec"])


def test_a_policy_that_the_schema_cannot_judge_is_refused_with_its_field(served: Installed) -> None:
    policy = {
        "apiVersion": "valve.io/v1alpha1",
        "kind": "ColocationPolicy",
        "metadata": {"name": "case"},
        "spec": {"cpuDevice": {"memory": "1Gi"}, "memory": {"onlineFloor": "100%"}},
    }
    with pytest.raises(Refused, match=r"spec\.memory\.onlineFloor: .*leaves offline no slab"):
        create(served, policy)
