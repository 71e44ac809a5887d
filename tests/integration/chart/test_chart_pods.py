# SPDX-License-Identifier: Apache-2.0
"""The admission policy on pods: what the API server says with no webhook and no operator anywhere.

The table of cases is the operator's own (valve_operator.cases): a pod as admission makes it passes, a pod as
its author wrote it never does. What the policy catches beyond that is a table here.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.kubectl import Refused
from valve_operator.admission import Admitted, Defaults, decide
from valve_operator.cases import CASES, Case

DEFAULTS = Defaults("valve-online", "valve-offline")
ADMITTED = [case for case in CASES if isinstance(case.outcome, dict)]
Pod = dict[str, Any]


@pytest.fixture(scope="module")
def alone(installed: ControlPlane) -> ControlPlane:
    """The chart without its webhook, as after somebody deleted it; it may take a moment to be in force."""
    installed.kubectl("delete", "mutatingwebhookconfiguration", "valve")
    installed.kubectl.until(
        "accounts can have pods", ["serviceaccount", "default"], lambda found: bool(found["metadata"]["uid"])
    )
    bad = pod_of(ADMITTED[0])
    for _ in range(100):
        try:
            ask(installed, bad)
        except Refused as refused:
            if "ValidatingAdmissionPolicy" in refused.sentence:
                break
    return installed


def pod_of(case: Case) -> Pod:
    """As its author wrote it, complete enough for the API server."""
    pod = copy.deepcopy(case.pod())
    pod["metadata"]["generateName"] = f"{pod['metadata'].pop('name')}-"
    mounts = {
        mount["name"]
        for container in pod["spec"]["containers"]
        for mount in container.get("volumeMounts", ())
    }
    pod["spec"]["volumes"] = [{"name": name, "emptyDir": {}} for name in sorted(mounts)]
    for container in pod["spec"]["containers"]:
        container["image"] = "none"
    return pod


def admitted(case: Case) -> Pod:
    answer = decide(pod_of(case), DEFAULTS)
    assert isinstance(answer, Admitted)
    return answer.pod


def ask(plane: ControlPlane, pod: Pod) -> str:
    return plane.kubectl("create", "--dry-run=server", "-f", "-", "-o", "name", stdin=json.dumps(pod))


@pytest.mark.parametrize("case", ADMITTED, ids=lambda case: case.what)
def test_a_pod_passes_as_admission_makes_it(alone: ControlPlane, case: Case) -> None:
    assert ask(alone, admitted(case)).startswith("pod/")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_a_pod_never_passes_as_its_author_wrote_it(alone: ControlPlane, case: Case) -> None:
    with pytest.raises(Refused) as refused:
        ask(alone, pod_of(case))
    assert "ValidatingAdmissionPolicy 'valve-pods'" in refused.value.sentence


def test_a_pod_without_a_word_about_valve_passes(alone: ControlPlane) -> None:
    pod = pod_of(ADMITTED[0])
    pod["metadata"]["annotations"] = {"example.com/valve": "x"}
    assert ask(alone, pod).startswith("pod/")


def broken(path: tuple[str | int, ...], value: Any, workload: str = "offline") -> Pod:
    """An admitted pod, changed by something that comes after Valve's webhook."""
    pod = admitted(next(case for case in ADMITTED if case.annotations["workload"] == workload))
    place: Any = pod
    for step in path[:-1]:
        place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]
    place[path[-1]] = value
    return pod


CONTAINER = ("spec", "containers", 0)


@pytest.mark.parametrize(
    ("description", "pod", "sentence"),
    [
        ("privileged", broken((*CONTAINER, "securityContext"), {"privileged": True}), "privileged"),
        (
            "its own socket",
            broken((*CONTAINER, "env"), [{"name": "VALVE_SOCKET", "value": "/x"}]),
            "which Valve sets itself",
        ),
        (
            "its own GPU",
            broken((*CONTAINER, "env"), [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}], "online"),
            "which Valve sets itself",
        ),
        (
            "another workload",
            broken(("metadata", "annotations", "valve.io/workload"), "online"),
            "limits offline pods",
        ),
        ("another label", broken(("metadata", "labels", "valve.io/workload"), "online"), "the label"),
        (
            "the resource taken away",
            broken((*CONTAINER, "resources"), {}),
            "so nothing could pause it: look at the operator (kubectl -n valve-system get pods)",
        ),
        (
            "the seat taken away",
            broken((*CONTAINER, "resources"), {}, "online"),
            "would run unprotected: look at the operator",
        ),
        (
            "the annotations taken away",
            broken(("metadata", "annotations"), {}),
            "the annotation valve.io/workload is missing",
        ),
        (
            "a size that is none",
            broken(("metadata", "annotations", "valve.io/gpu-memory"), "lots"),
            'valve.io/gpu-memory is "lots"; write a size such as 24Gi',
        ),
    ],
)
def test_what_is_changed_after_admission_is_refused(
    alone: ControlPlane, description: str, pod: Pod, sentence: str
) -> None:
    with pytest.raises(Refused) as refused:
        ask(alone, pod)
    assert sentence in refused.value.sentence, description


def test_a_running_pods_annotations_cannot_change(alone: ControlPlane) -> None:
    pod = admitted(next(case for case in ADMITTED if case.annotations["workload"] == "offline"))
    pod["metadata"] = {**pod["metadata"], "name": "standing"}
    del pod["metadata"]["generateName"]
    alone.kubectl.apply(pod)
    try:
        for change in ("valve.io/workload=online", "valve.io/gpu-memory=80Gi", "valve.io/workload-"):
            with pytest.raises(Refused, match="of a pod cannot be changed"):
                alone.kubectl("annotate", "pod", "standing", change, "--overwrite")
        alone.kubectl("annotate", "pod", "standing", "example.com/note=fine")
        alone.kubectl("label", "pod", "standing", "team=batch")
    finally:
        alone.kubectl("delete", "pod", "standing", "--force")
