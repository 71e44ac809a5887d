# SPDX-License-Identifier: Apache-2.0
"""`kubectl valve` against a real API server: top, explain, drain-offline."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.control_plane import ControlPlane

OFFLINE, ONLINE = "valve.io/offline-memory-gib", "valve.io/online-gpu"
NODE = "cli-node"
STATUS: dict[str, Any] = {
    "reportedAt": "2999-01-01T00:00:00Z",
    "conditions": [
        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    ],
    "gpus": [
        {
            "id": "GPU-7", "memory": "80Gi", "free": "10Gi", "reservation": "2Gi", "paused": True,
            "pausedReason": "busy",
            "tenants": [
                {"name": "cli/batch", "workload": "offline", "processes": 1, "memory": "20Gi",
                 "limit": "24Gi"},
                {"name": "cli/chat", "workload": "online", "processes": 1, "memory": "50Gi", "limit": "80Gi",
                 "busy": True},
            ],
        }
    ],
}  # fmt: skip


def run(plane: ControlPlane, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "valve_cli.kubectl", *arguments, "--kubeconfig", str(plane.kubeconfig)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def pod(name: str, workload: str, **labels: str) -> dict[str, Any]:
    resource = {ONLINE: "1"} if workload == "online" else {OFFLINE: "1"}
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "cli", "labels": labels,
                     "annotations": {"valve.io/workload": workload}},
        "spec": {
            "nodeName": NODE, "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "x", "resources": {"limits": resource}}],
        },
    }  # fmt: skip


@pytest.fixture
def plane(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """A node that nobody runs, its ColocationNode with a status, and a namespace; all removed after."""
    kubectl = control_plane.kubectl
    kubectl.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "cli"}},
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}},
        {"apiVersion": "valve.io/v1alpha1", "kind": "ColocationNode", "metadata": {"name": NODE},
         "spec": {"policy": {"name": "inference"}}},
    )  # fmt: skip
    patch = json.dumps({"status": STATUS})
    kubectl("patch", "colocationnode", NODE, "--subresource=status", "--type=merge", "-p", patch)
    kubectl("wait", "serviceaccount/default", "-n", "cli", "--for=create", "--timeout=30s")
    yield control_plane
    kubectl("delete", "pods", "--all", "-n", "cli", "--force", "--grace-period=0")
    kubectl("delete", "poddisruptionbudgets", "--all", "-n", "cli")
    kubectl("delete", "colocationnode", NODE)
    kubectl("delete", "node", NODE)


def test_top_shows_the_cluster(plane: ControlPlane) -> None:
    done = run(plane, "top", "-o", "json", "--node", NODE)
    assert done.returncode == 0, done.stderr
    (device,) = json.loads(done.stdout)["devices"]
    assert (device["node"], device["device"], device["policy"]) == (NODE, "GPU-7", "inference")
    assert [tenant["name"] for tenant in device["tenants"]] == ["cli/chat", "cli/batch"]
    assert "offline paused (busy)" in run(plane, "top", "--once").stdout
    assert "no such ColocationNode" in run(plane, "top", "--once", "--node", "nowhere").stdout


def test_explain_speaks_of_the_pod(plane: ControlPlane) -> None:
    plane.kubectl.apply(pod("batch", "offline"))
    running = {"status": {"phase": "Running", "containerStatuses": [
        {"name": "c", "image": "x", "imageID": "x", "ready": True, "restartCount": 0,
         "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]}}  # fmt: skip
    plane.kubectl("patch", "pod", "batch", "-n", "cli", "--subresource=status", "-p", json.dumps(running))
    done = run(plane, "explain", "cli/batch", "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["state"] == "paused"
    assert "cli/chat has requests" in found["sentences"][0]
    text = run(plane, "explain", "batch", "-n", "cli").stdout
    assert "cli/batch is paused on GPU-7" in " ".join(text.split())


def test_explain_a_pod_that_the_scheduler_cannot_place(plane: ControlPlane) -> None:
    unplaced = pod("large", "offline")
    del unplaced["spec"]["nodeName"]
    plane.kubectl.apply(unplaced)
    plane.kubectl.until(
        "the scheduler's word", ["pod", "large", "-n", "cli"], lambda o: o.get("status", {}).get("conditions")
    )
    found = json.loads(run(plane, "explain", "cli/large", "-o", "json").stdout)
    assert found["state"] == "pending"
    assert any("The scheduler says: 0/" in sentence for sentence in found["sentences"])


def test_explain_what_is_not_there(plane: ControlPlane) -> None:
    done = run(plane, "explain", "cli/nothing")
    assert done.returncode == 1
    assert "There is no pod cli/nothing" in done.stdout
    assert "Traceback" not in done.stderr


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {one["pod"]: one["outcome"] for one in json.loads(done.stdout)["pods"]}


def test_drain_evicts_offline_pods_and_nothing_else(plane: ControlPlane) -> None:
    plane.kubectl.apply(pod("batch-1", "offline"), pod("batch-2", "offline"), pod("chat", "online"))
    dry = run(plane, "drain-offline", NODE, "--dry-run", "-o", "json")
    assert outcomes(dry) == {"cli/batch-1": "would go", "cli/batch-2": "would go"}
    assert len(plane.kubectl.items("pods", "-n", "cli")) == 3, "nothing has happened"
    done = run(plane, "drain-offline", NODE, "-o", "json")
    assert done.returncode == 0, done.stderr
    assert outcomes(done) == {"cli/batch-1": "gone", "cli/batch-2": "gone"}
    assert [one["metadata"]["name"] for one in plane.kubectl.items("pods", "-n", "cli")] == ["chat"]
    assert "has no offline pods" in run(plane, "drain-offline", NODE).stdout


def budget(minimum: int) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": {"name": "keep", "namespace": "cli"},
        "spec": {"minAvailable": minimum, "selector": {"matchLabels": {"app": "kept"}}},
    }  # fmt: skip


def test_drain_honours_a_budget_and_waits_for_it(plane: ControlPlane) -> None:
    plane.kubectl.apply(budget(1), pod("kept", "offline", app="kept"))
    ready = {"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
    plane.kubectl("patch", "pod", "kept", "-n", "cli", "--subresource=status", "-p", json.dumps(ready))
    plane.kubectl.until(
        "the budget to count", ["pdb", "keep", "-n", "cli"],
        lambda o: o.get("status", {}).get("currentHealthy") == 1,
    )  # fmt: skip
    dry = run(plane, "drain-offline", NODE, "--dry-run", "-o", "json")
    assert outcomes(dry) == {"cli/kept": "blocked"}
    assert dry.returncode == 1
    blocked = run(plane, "drain-offline", NODE, "--timeout", "1", "-o", "json")
    assert outcomes(blocked) == {"cli/kept": "blocked"}
    assert "disruption budget" in json.loads(blocked.stdout)["pods"][0]["why"]

    def give_way() -> None:
        time.sleep(3)
        plane.kubectl("delete", "pdb", "keep", "-n", "cli")

    helper = threading.Thread(target=give_way)
    helper.start()
    done = run(plane, "drain-offline", NODE, "-o", "json")
    helper.join()
    assert outcomes(done) == {"cli/kept": "gone"}
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("drain-offline", "nowhere"), "there is no node nowhere"),
        (("explain", "x/y", "--context", "none"), "there is no context 'none'"),
    ],
)
def test_mistakes_get_a_sentence(plane: ControlPlane, arguments: tuple[str, ...], sentence: str) -> None:
    done = run(plane, *arguments)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_away_gets_a_sentence(tmp_path: Path, plane: ControlPlane) -> None:
    text = plane.kubeconfig.read_text().replace(plane.server, "https://127.0.0.1:1")
    away = tmp_path / "away.kubeconfig"
    away.write_text(text)
    command = [sys.executable, "-m", "valve_cli.kubectl", "top", "--once", "--kubeconfig", str(away)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr
