# SPDX-License-Identifier: Apache-2.0
"""Admission: the table of docs/annotations.md, and what no table shows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_api.names import LABEL_STARVED, LABEL_WORKLOAD
from valve_operator import reference
from valve_operator.admission import Admitted, Defaults, Refused, decide
from valve_operator.cases import CASES, OFFLINE, ONLINE, Case

DEFAULTS = Defaults("valve-online", "valve-offline")
GOOD = [case for case in CASES if isinstance(case.outcome, dict)]


def admitted(pod: dict[str, Any], defaults: Defaults = DEFAULTS) -> dict[str, Any]:
    answer = decide(pod, defaults)
    assert isinstance(answer, Admitted), str(answer)
    return answer.pod


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_the_table_of_the_documentation(case: Case) -> None:
    pod = case.pod()
    before = copy.deepcopy(pod)
    answer = decide(pod, DEFAULTS)
    assert pod == before, "the pod that was given must not change"
    if isinstance(case.outcome, tuple):
        assert answer == Refused(case.outcome)
        return
    assert isinstance(answer, Admitted), str(answer)
    for container in answer.pod["spec"]["containers"]:
        asked = container.get("resources", {})
        if container["name"] == case.engine:
            assert asked["limits"] == asked["requests"] == case.outcome
        else:
            assert not asked


def test_the_documentation_is_up_to_date() -> None:
    assert (Path(__file__).parents[3] / reference.PATH).read_text() == reference.document()


@pytest.mark.parametrize("case", GOOD, ids=[case.what for case in GOOD])
def test_a_second_pass_changes_nothing(case: Case) -> None:
    once = admitted(case.pod())
    assert admitted(once) == once


def test_a_pod_without_annotations_is_the_same_object() -> None:
    pod = {
        "metadata": {"annotations": {"prometheus.io/scrape": "true"}},
        "spec": {"containers": [{"name": "a"}]},
    }
    assert admitted(pod) is pod


def test_what_a_pod_gets_beside_its_resource() -> None:
    online, offline = admitted(Case("", ONLINE, {}).pod()), admitted(Case("", OFFLINE, {}).pod())
    for pod, workload in ((online, "online"), (offline, "offline")):
        assert pod["metadata"]["labels"][LABEL_WORKLOAD] == workload
        assert pod["spec"]["priorityClassName"] == f"valve-{workload}"
        assert pod["spec"]["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    assert "affinity" not in online["spec"]
    (preference,) = offline["spec"]["affinity"]["nodeAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert preference["preference"]["matchExpressions"] == [
        {"key": LABEL_STARVED, "operator": "DoesNotExist"}
    ]


def test_what_the_author_wrote_is_kept() -> None:
    pod = Case("", OFFLINE, {}).pod()
    pod["spec"] |= {
        "priorityClassName": "mine",
        "priority": 7,
        "tolerations": [{"operator": "Exists"}],
        "affinity": {
            "nodeAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": {}}]
            }
        },
    }
    pod["spec"]["containers"][0]["resources"] = {"limits": {"cpu": "4"}, "requests": {"cpu": "2"}}
    spec = admitted(pod)["spec"]
    assert (spec["priorityClassName"], spec["priority"]) == ("mine", 7)
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert len(spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]) == 2
    assert spec["containers"][0]["resources"] == {
        "limits": {"cpu": "4", "valve.io/offline-memory-gib": "24"},
        "requests": {"cpu": "2", "valve.io/offline-memory-gib": "24"},
    }


def test_the_priority_that_the_api_server_gave_goes_with_the_class() -> None:
    """The API server has filled in the default class before; number and class would contradict each other."""
    pod = Case("", ONLINE, {}).pod()
    pod["spec"] |= {"priority": 0, "preemptionPolicy": "PreemptLowerPriority"}
    spec = admitted(pod)["spec"]
    assert "priority" not in spec
    assert "preemptionPolicy" not in spec


def test_no_class_and_no_toleration_where_the_flags_give_none() -> None:
    spec = admitted(Case("", ONLINE, {}).pod(), Defaults(tolerations=()))["spec"]
    assert set(spec) == {"containers"}


def test_an_init_container_is_looked_at_too() -> None:
    pod = Case("", OFFLINE, {}).pod()
    pod["spec"]["initContainers"] = [{"name": "load", "securityContext": {"privileged": True}}]
    answer = decide(pod, DEFAULTS)
    assert isinstance(answer, Refused)
    assert "container load is privileged" in str(answer)


KEYS = st.sampled_from(
    ["valve.io/workload", "valve.io/gpu-memory", "valve.io/container", "valve.io/x", "other"]
)
VALUES = st.sampled_from(["online", "offline", "24Gi", "0", "a", "b", "", "1e3", "99999999Ti"]) | st.text(
    "aZ0.-/ µ", max_size=8
)
RESOURCES = st.dictionaries(
    st.sampled_from(["valve.io/online-gpu", "valve.io/offline-memory-gib", "nvidia.com/gpu", "cpu"]),
    st.sampled_from(["0", "1", "24"]),
    max_size=2,
)


@given(
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), RESOURCES, min_size=1, max_size=3),
)
def test_every_pod_of_valve_is_protected_or_refused(
    annotations: dict[str, str], asks: dict[str, Any]
) -> None:
    """Whatever is written: no exception, no pod of Valve without exactly one kind of its resources."""
    containers = {name: {"resources": {"limits": limits}} for name, limits in asks.items()}
    pod = Case("", {}, {}, containers).pod()
    pod["metadata"]["annotations"] = annotations
    answer = decide(pod, DEFAULTS)
    ours = any(
        key.startswith("valve.io/") for key in [*annotations, *(r for ask in asks.values() for r in ask)]
    )
    if isinstance(answer, Refused):
        assert ours
        assert all(answer.sentences)
        return
    if not ours:
        assert answer.pod is pod
        return
    found = [
        (container["name"], name, amount)
        for container in answer.pod["spec"]["containers"]
        for name, amount in container["resources"].get("limits", {}).items()
        if name.startswith(("valve.io/", "nvidia.com/"))
    ]
    assert len(found) == 1, found
    wanted = {"online": "valve.io/online-gpu", "offline": "valve.io/offline-memory-gib"}
    assert found[0][1] == wanted[annotations["valve.io/workload"]]
    assert int(found[0][2]) >= 1
    assert admitted(answer.pod) == answer.pod
