# SPDX-License-Identifier: Apache-2.0
"""Deployments and Jobs are judged when they are applied, by the API server alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from operator_rig import Installed

from e2e.cluster.kubectl import Refused

OFFLINE = {"valve.io/workload": "offline", "valve.io/gpu-memory": "2Gi"}


def workload(kind: str, own: dict[str, str], pods: dict[str, str], **container: Any) -> dict[str, Any]:
    labels = {"app": "x"}
    template: dict[str, Any] = {
        "metadata": {"labels": labels, "annotations": pods},
        "spec": {"containers": [{"name": "c", "image": "x", **container}]},
    }
    group = "apps/v1"
    spec: dict[str, Any] = {"selector": {"matchLabels": labels}, "template": template}
    if kind in ("Job", "CronJob"):
        group, spec = "batch/v1", {"template": template}
        template["spec"]["restartPolicy"] = "Never"
    if kind == "CronJob":
        spec = {"schedule": "@daily", "jobTemplate": {"spec": spec}}
    meta = {"name": "case", "namespace": "default", "annotations": own}
    return {"apiVersion": group, "kind": kind, "metadata": meta, "spec": spec}


GPU = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("a good Deployment", workload("Deployment", {}, {"valve.io/workload": "online"}), ""),
    ("a good Job", workload("Job", {}, OFFLINE), ""),
    ("a good CronJob", workload("CronJob", {}, OFFLINE), ""),
    ("none of ours, with a GPU", workload("Deployment", {}, {}, **GPU), ""),
    ("another annotation of ours on it", workload("Deployment", {"valve.io/note": "x"}, {}), ""),
    ("the annotation on both", workload("Deployment", OFFLINE, OFFLINE), ""),
    (
        "the annotation on the Deployment itself",
        workload("Deployment", {"valve.io/workload": "online"}, {}),
        "stands on the Deployment itself, where its pods do not get it; write it in spec.template.metadata",
    ),
    (
        "the annotation on the CronJob itself",
        workload("CronJob", OFFLINE, {}),
        "write it in spec.jobTemplate.spec.template.metadata.annotations",
    ),
    (
        "a misspelt value",
        workload("Job", {}, {"valve.io/workload": "Offline"}),
        'valve.io/workload is "Offline"; write online or offline',
    ),
    (
        "a misspelt name",
        workload("Job", {}, {"valve.io/work": "online"}),
        "valve.io/work is no annotation of Valve",
    ),
    (
        "offline without memory",
        workload("Job", {}, {"valve.io/workload": "offline"}),
        "the annotation valve.io/gpu-memory is missing",
    ),
    (
        "a GPU of its own",
        workload("Deployment", {}, {"valve.io/workload": "online"}, **GPU),
        "container c asks for a GPU of its own",
    ),
]


@pytest.mark.parametrize(("case", "body", "sentence"), CASES, ids=[case[0] for case in CASES])
def test_a_workload(installed: Installed, case: str, body: dict[str, Any], sentence: str) -> None:
    words = ("create", "--dry-run=server", "-f", "-")
    if not sentence:
        installed.kubectl(*words, stdin=json.dumps(body))
        return
    with pytest.raises(Refused) as refusal:
        installed.kubectl(*words, stdin=json.dumps(body))
    assert sentence in refusal.value.sentence


def test_the_policies_compile_without_a_warning(installed: Installed) -> None:
    for name in ("valve-workloads", "valve-cronjobs"):
        policy = installed.kubectl.get("validatingadmissionpolicy", name)
        assert not policy.get("status", {}).get("typeChecking", {}).get("expressionWarnings")
