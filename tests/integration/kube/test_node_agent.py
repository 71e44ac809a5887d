# SPDX-License-Identifier: Apache-2.0
"""`valve agent --node` against a real API server, with tenants in real cgroups."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from node_live import SLAB, SLABS, NodeAgent, PodTenant, colocation_node, condition, wait_status

from e2e.cluster.control_plane import ControlPlane
from valve_cli.bench.rig import wait_for

Pods = Callable[..., PodTenant]


def test_tenants_of_pods_share_the_device_and_the_object_shows_it(
    running: NodeAgent, pod: Pods, control_plane: ControlPlane
) -> None:
    offline, online = pod(running, "offline", "batch", "job-1"), pod(running, "online", "serve", "vllm-0")
    for tenant in (offline, online):
        assert tenant.ask("attach", timeout_ms=15_000)["attached"], tenant.ask("state")
    offline.ask("arena", slabs=20, slab_bytes=SLAB)
    offline.ask("want", slabs=20)
    wait_for("20 slabs", lambda: len(offline.ask("poll")["held"]) == 20)
    online.ask("busy")
    running.wait_event("pause")
    status = wait_status(
        control_plane.kubectl, running.node, "the pause to be reported",
        lambda status: status.get("gpus") and status["gpus"][0].get("pausedReason") == "busy",
    )  # fmt: skip
    assert condition(status, "Ready")["status"] == "True"
    assert (status["onlineTenants"], status["offlineTenants"]) == (1, 1)
    (gpu,) = status["gpus"]
    tenants = {tenant["name"]: tenant for tenant in gpu["tenants"]}
    assert set(tenants) == {"batch/job-1", "serve/vllm-0"}
    assert tenants["batch/job-1"]["memory"] == "40Mi"
    assert tenants["batch/job-1"]["limit"] == f"{SLABS * 2}Mi", "1 GiB is more than this device has"
    assert tenants["serve/vllm-0"]["busy"] is True
    assert (
        status["observedGeneration"]
        == control_plane.kubectl.get("colocationnode", running.node)["metadata"]["generation"]
    )


def test_without_settings_the_agent_does_not_listen(node: NodeAgent, control_plane: ControlPlane) -> None:
    node.launch()
    wait_for(
        "the agent to say what it waits for", lambda: "waiting for settings" in node.log_path.read_text()
    )
    assert "no ColocationNode" in node.log_path.read_text()
    assert not node.socket.exists(), "offline would come in"
    control_plane.kubectl.apply(colocation_node(node.node))
    wait_for("the agent to listen", node.socket.exists)


def test_settings_change_while_tenants_run(
    running: NodeAgent, pod: Pods, control_plane: ControlPlane
) -> None:
    offline = pod(running, "offline", "batch", "job-1")
    assert offline.ask("attach", timeout_ms=15_000)["attached"]
    offline.ask("arena", slabs=20, slab_bytes=SLAB)
    changed = colocation_node(
        running.node,
        memory={"slabSize": "2Mi", "onlineFloor": "50%", "reservation": {"min": "12Mi", "max": "16Mi"}},
    )
    control_plane.kubectl.apply(changed)
    event = running.wait_event("settings")
    assert event["pending"] == ""
    slabs = running.status()["slabs"]
    assert (slabs["online_floor"], slabs["reservation"]) == (SLABS // 2, 6)
    assert offline.ask("state")["connected"], "it did not notice"


def test_a_new_slab_size_waits_until_nobody_holds_memory(
    running: NodeAgent, pod: Pods, control_plane: ControlPlane
) -> None:
    offline = pod(running, "offline", "batch", "job-1")
    assert offline.ask("attach", timeout_ms=15_000)["attached"]
    offline.ask("arena", slabs=20, slab_bytes=SLAB)
    changed = colocation_node(running.node, memory={"slabSize": "4Mi"})
    control_plane.kubectl.apply(changed)
    status = wait_status(
        control_plane.kubectl, running.node, "the restart to be announced",
        lambda status: condition(status, "Ready").get("reason") == "RestartNeeded",
    )  # fmt: skip
    assert "memory.slabSize changes when no tenant" in condition(status, "Ready")["message"]
    assert running.status()["slabs"]["bytes_each"] == SLAB
    offline.close()
    assert running.wait() == 0, "it ends, and the DaemonSet starts it anew"
    running.start()
    assert running.status()["slabs"]["bytes_each"] == 2 * SLAB


def test_settings_that_cannot_hold_are_refused_and_the_old_ones_stay(
    running: NodeAgent, control_plane: ControlPlane
) -> None:
    """75 % of the device at least, 16Mi at most: each is legal, together they are not on this device."""
    changed = colocation_node(
        running.node, memory={"slabSize": "2Mi", "reservation": {"min": "75%", "max": "16Mi"}}
    )
    control_plane.kubectl.apply(changed)
    status = wait_status(
        control_plane.kubectl, running.node, "the refusal",
        lambda status: condition(status, "Ready").get("reason") == "SettingsRefused",
    )  # fmt: skip
    assert "spec.memory.reservation.min" in condition(status, "Ready")["message"]
    assert running.status()["slabs"]["reservation"] == 1


def test_status_is_written_at_a_bounded_rate(
    running: NodeAgent, pod: Pods, control_plane: ControlPlane
) -> None:
    """Something changes all the time; the object does not."""
    offline = pod(running, "offline", "batch", "job-1")
    assert offline.ask("attach", timeout_ms=15_000)["attached"]
    offline.ask("arena", slabs=20, slab_bytes=SLAB)
    versions = set()
    deadline = time.monotonic() + 11
    while time.monotonic() < deadline:
        for slabs in (5, 10):
            offline.ask("want", slabs=slabs)
            offline.ask("poll")
        versions.add(control_plane.kubectl.get("colocationnode", running.node)["metadata"]["resourceVersion"])
    assert len(versions) <= 4, "at most one write in five seconds"
    assert len(versions) >= 2, "but it is written"


def test_a_pod_without_valves_resources_does_not_get_in(running: NodeAgent, pod: Pods) -> None:
    stranger = pod(running, "online", "serve", "vllm-0")
    assert stranger.ask("attach", timeout_ms=15_000)["attached"]
    running.kubelet.pods.clear()
    other = pod(running, "offline", "batch", "job-1")
    running.kubelet.pods.clear()
    event = running.wait_event("reject")
    assert "annotate the pod with valve.io/workload" in event["why"] or "not known yet" in event["why"]
    assert other.wait() == 78, "it refuses to run unprotected"


def test_a_tenant_learns_nothing_of_the_others(running: NodeAgent, pod: Pods) -> None:
    """The status socket lies in the folder that tenants mount, and root in a container passes its mode."""
    tenant = pod(running, "offline", "batch", "job-1")
    assert tenant.ask("attach", timeout_ms=15_000)["attached"], tenant.ask("state")
    procs = next(place for place in tenant.cgroup.rglob("cgroup.procs"))
    read = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
        "print(len(b''.join(iter(lambda: s.recv(65536), b''))))"
    )
    ask = [sys.executable, "-c", read, f"{running.socket}.status"]
    inside = ["sh", "-c", f'echo $$ > {procs}; exec "$0" "$@"', *ask]
    answers = [
        subprocess.run(command, capture_output=True, text=True, check=True) for command in (inside, ask)
    ]
    assert [int(answer.stdout) > 0 for answer in answers] == [False, True]
