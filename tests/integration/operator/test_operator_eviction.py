# SPDX-License-Identifier: Apache-2.0
"""Starved pods leave by the Eviction API, and only when their disruption budget agrees."""

from __future__ import annotations

import json

from operator_rig import Installed, eventually, names


def run_pod(installed: Installed, name: str, node: str) -> None:
    """A pod that some controller owns, bound to a node and Running, as a kubelet would say."""
    controller = installed.kubectl.get("configmap", "kube-root-ca.crt", "-n", "default")
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "kube-root-ca.crt", "controller": True}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"app": "batch"},
            "annotations": {"valve.io/workload": "offline", "valve.io/gpu-memory": "8Gi"},
            "ownerReferences": [{**owner, "uid": controller["metadata"]["uid"]}],
        },
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "x"}],
        },
    }
    installed.kubectl("create", "-f", "-", stdin=json.dumps(pod))
    ready = [{"type": kind, "status": "True"} for kind in ("Ready", "ContainersReady")]
    installed.patch_status("pod", name, {"phase": "Running", "conditions": ready})


def test_a_budget_is_honoured_and_then_the_pod_moves(installed: Installed) -> None:
    kubectl = installed.kubectl
    installed.node("busy")
    installed.node("free")
    with installed.replica("a") as operator:
        installed.policy("fleet", offline={"starvationDelay": "2s"})
        eventually("settings", lambda: names(kubectl, "colonode") == {"busy", "free"})
        try:
            run_pod(installed, "starving", "busy")
            budget = {"minAvailable": 1, "selector": {"matchLabels": {"app": "batch"}}}
            kubectl.apply(
                {
                    "apiVersion": "policy/v1",
                    "kind": "PodDisruptionBudget",
                    "metadata": {"name": "batch", "namespace": "default"},
                    "spec": budget,
                }
            )
            eventually(
                "the budget counts", lambda: kubectl.get("pdb", "batch").get("status", {}).get("expectedPods")
            )
            tenant = {"name": "default/starving", "workload": "offline", "busy": False}
            installed.report("busy", paused=True, preemptions=1, tenants=[tenant])
            eventually("the mark", lambda: names(kubectl, "node", "-l", "valve.io/starved=true") == {"busy"})
            failed = 'valve_operator_actions_total{outcome="failed"}'
            eventually("the budget says no", lambda: operator.metrics()[failed] >= 1)
            assert not kubectl.get("pod", "starving")["metadata"].get("deletionTimestamp")
            kubectl("delete", "pdb", "batch")
            eventually("it is gone", lambda: "starving" not in names(kubectl, "pod"))
            events = kubectl.get("events", "--field-selector=involvedObject.name=starving")["items"]
            assert "Starved" in {event["reason"] for event in events}
        finally:
            kubectl("delete", "pdb", "--all")
            kubectl("delete", "pod", "--all", "--force", "--grace-period=0")
