# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (a table)
"""What people are told about a pod, for every state it can be in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from valve_cli.explain import Explanation, explain, explain_missing

NOW = datetime(2026, 11, 21, 14, 0, 0, tzinfo=UTC)
OFFLINE, ONLINE = "valve.io/offline-memory-gib", "valve.io/online-gpu"
RUNNING = [{"name": "main", "state": {"running": {}}}]


def pod(
    workload: str | None = "offline", resource: dict[str, str] | None = None, node: str = "n1", **status: Any
) -> dict[str, Any]:
    limits = {OFFLINE: "4"} if workload == "offline" else {ONLINE: "1"}
    return {
        "metadata": {
            "namespace": "batch", "name": "job", "uid": "u",
            "annotations": {"valve.io/workload": workload} if workload else {},
        },
        "spec": {
            "containers": [{"name": "main", "resources": {"limits": limits if resource is None else resource}}],
            **({"nodeName": node} if node else {}),
        },
        "status": {"phase": "Running", "containerStatuses": RUNNING, **status},
    }  # fmt: skip


def tenant(name: str, workload: str, busy: bool, processes: int = 1) -> dict[str, Any]:
    return {"name": name, "workload": workload, "processes": processes, "memory": "2Gi", "limit": "4Gi",
            "busy": busy}  # fmt: skip


def node(*tenants: dict[str, Any], reported: str = "2026-11-21T13:59:50Z", **gpu: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "n1"},
        "spec": {"policy": {"name": "p"}},
        "status": {
            "reportedAt": reported,
            "gpus": [{"id": "GPU-1", "free": "3Gi", "reservation": "1Gi", "tenants": list(tenants), **gpu}],
        },
    }


JOB, CHAT = tenant("batch/job", "offline", False), tenant("serve/chat", "online", True)
REFUSED = {"terminated": {"exitCode": 78}}
UNSCHEDULABLE = {
    "type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient memory-gib.",
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any], list[dict[str, Any]], str, list[str]]] = [
    ("not annotated", pod(None, {}), [], "foreign", ["neither protects nor pauses", "valve.io/workload: online"]),
    ("a value that is none", pod("batch", {}), [], "refused", ["neither online nor offline"]),
    ("admission did not see it", pod(resource={}), [], "refused", ["gave it no valve.io/offline-memory-gib",
                                                                    "Delete the pod"]),
    ("no policy", pod(node="", phase="Pending"), [], "pending", ["4 GiB of offline memory",
                                                                  "No node is under a ColocationPolicy"]),
    ("nobody lends so much", pod(node="", phase="Pending", conditions=[UNSCHEDULABLE]), [node()], "pending",
     ["0/3 nodes are available", "lends most is n1, with 2 GiB", "valve.io/gpu-memory"]),
    ("it is something else", pod(node="", phase="Pending"), [node(free="9Gi")], "pending",
     ["n1 would lend 8 GiB: it is something else"]),
    ("a seat is missing", pod("online", node="", phase="Pending"), [node()], "pending", ["a seat for an online"]),
    ("the image cannot be had", pod(phase="Pending", containerStatuses=[
        {"name": "main", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]),
     [node()], "starting", ["does not run", "Container main: ImagePullBackOff: no such image."]),
    ("refused by the agent", pod(containerStatuses=[
        {"name": "main", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": REFUSED}]),
     [node()], "starting", ["the agent refuses", "kubectl logs --previous -n batch job"]),
    ("failed", pod(phase="Failed", message="Pod was rejected: UnexpectedAdmissionError"), [node()], "failed",
     ["UnexpectedAdmissionError"]),
    ("evicted", pod(phase="Failed", reason="Evicted", conditions=[
        {"type": "DisruptionTarget", "status": "True", "message": "starved for 10m"}]), [node()], "failed",
     ["It was disrupted: starved for 10m"]),
    ("done", pod(phase="Succeeded"), [node()], "done", ["has ended well"]),
    ("the node left the policy", pod(), [], "unknown", ["no ColocationPolicy selects any more"]),
    ("the agent never reported", pod(), [{**node(), "status": {}}], "unknown", ["has not reported yet",
                                                                               "Offline stays stopped"]),
    ("the agent is silent", pod("online"), [node(reported="2026-11-21T13:50:00Z")], "unknown",
     ["has not reported for 600 s", "Online goes on"]),
    ("no engine", pod(), [node(CHAT)], "waiting", ["knows no engine of it", "statically linked"]),
    ("not attached", pod(), [node(tenant("batch/job", "offline", False, 0))], "waiting", ["no engine has attached"]),
    ("paused for one", pod(), [node(JOB, CHAT, paused=True, pausedReason="busy")], "paused",
     ["serve/chat has requests, and online goes first", "It holds 2Gi of at most 4Gi."]),
    ("paused for two", pod(), [node(JOB, CHAT, tenant("serve/b", "online", True), paused=True,
                                    pausedReason="busy")], "paused", ["serve/chat and serve/b have requests"]),
    ("cooldown", pod(), [node(JOB, paused=True, pausedReason="cooldown")], "paused", ["waits for the cooldown"]),
    ("reclaim", pod(), [node(JOB, paused=True, pausedReason="hold")], "paused", ["memory is being taken back"]),
    ("start", pod(), [node(JOB, paused=True, pausedReason="recovering")], "paused", ["has just started"]),
    ("a reason of a later agent", pod(), [node(JOB, paused=True, pausedReason="thermal")], "paused", ["thermal"]),
    ("it runs", pod(), [node(JOB, paused=False)], "running", ["runs on GPU-1"]),
    ("it runs and gets no more", pod(), [node(JOB, paused=False, free="1Gi")], "running",
     ["what is free (1Gi) is kept for online"]),
    ("two containers", pod(), [node({**JOB, "name": "batch/job/main"}, paused=False)], "running", ["runs on"]),
    ("online busy", pod("online"), [node({**CHAT, "name": "batch/job"},
                                         preemptLatency={"samples": 9, "p50Us": 200, "p99Us": 800})], "busy",
     ["is busy on GPU-1", "within 200 µs (median), 800 µs (p99)"]),
    ("online idle", pod("online"), [node(tenant("batch/job", "online", False))], "idle", ["is idle"]),
]  # fmt: skip


def words(found: Explanation) -> str:
    return "\n".join([*found.sentences, *found.advice])


@pytest.mark.parametrize(
    ("description", "what", "nodes", "state", "parts"), CASES, ids=[case[0] for case in CASES]
)
def test_explain(
    description: str, what: dict[str, Any], nodes: list[dict[str, Any]], state: str, parts: list[str]
) -> None:
    found = explain(what, nodes, [], NOW)
    assert found.state == state
    for part in parts:
        assert part in words(found)
    assert found.pod == "batch/job"
    assert all(sentence[-1] in ".:!?%" or "says" in sentence or "failed" in sentence or "warning" in sentence
               for sentence in found.sentences), "a sentence ends like one"  # fmt: skip


def test_the_last_warning_is_told() -> None:
    waiting = pod(phase="Pending", containerStatuses=[{"name": "main", "state": {"waiting": {}}}])
    events = [
        {"type": "Normal", "message": "Pulled"},
        {"type": "Warning", "message": "no room for its volume"},
    ]
    assert "Last warning: no room for its volume" in words(explain(waiting, [node()], events, NOW))


def test_a_pod_that_admission_refused_is_found_by_its_owners_event() -> None:
    events = [
        {
            "reason": "FailedCreate",
            "involvedObject": {"kind": "Job", "name": "job"},
            "message": "gpu-memory: 4",
        },
        {"reason": "FailedCreate", "involvedObject": {"kind": "Job", "name": "other"}, "message": "no"},
    ]
    found = explain_missing("batch/job-x7", events)
    assert found.state == "refused"
    assert "Job job could not make it: gpu-memory: 4" in words(found)
    assert explain_missing("batch/nothing", events).state == "missing"


def test_json_says_the_same() -> None:
    document = explain(pod(), [node(JOB, paused=False)], [], NOW).as_json()
    assert document["schema"] == "valve.io/explain/v1"
    assert document["state"] == "running"
