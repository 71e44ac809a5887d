# SPDX-License-Identifier: Apache-2.0
"""Kubernetes' own node tests of device plugins, put to ours: assignments.

After test/e2e_node/device_plugin_test.go of Kubernetes v1.36 (eleven scenarios; each test's docstring is
the scenario's title there). They test the kubelet with a sample plugin; here the kubelet is given and ours
is judged: same pods, same restarts, and besides the kubelet's view the plugin's own ledger must agree. A
pod's "devices" are GiB of offline memory, and what it sees of them is VALVE_GPU and VALVE_MEMORY_GIB.
"""

from __future__ import annotations

import json
import time

from e2e.cluster.processes import wait_for
from e2e.scenarios.kubernetes.plugin_rig import BRIEFLY, FOREVER, OFFLINE, TOTAL, PluginRig, container, pod


def test_schedule(rig: PluginRig, namespace: str) -> None:
    """Can schedule a pod that requires a device."""
    rig.start(namespace, "one", gib=3)
    rig.until_phase(namespace, "one", "Running")
    held = rig.devices(namespace, "one")["main"]
    assert len(held) == 3
    assert len({name.split("-")[0] for name in held}) == 1, "a whole request is on one GPU"
    said = rig.said(namespace, "one")
    assert (said["VALVE_MEMORY_GIB"], said["VALVE_GPU"][4:12]) == ("3", held[0].split("-")[0])
    entries = [entry for entry in rig.allocations() if entry["owner"] and entry["owner"]["pod"] == "one"]
    assert [(entry["memory_gib"], sorted(entry["device_ids"])) for entry in entries] == [(3, held)]


def test_cdi(rig: PluginRig, namespace: str) -> None:
    """can make a CDI device accessible in a container."""
    rig.start(namespace, "one", containers=[
        container("main", 1, FOREVER, env=[{"name": "VALVE_SOCKET", "value": "/not/ours"}]),
    ])  # fmt: skip
    rig.until_phase(namespace, "one", "Running")
    assert rig.said(namespace, "one")["VALVE_SOCKET"] == "/run/valve/agent.sock", (
        "CDI wins over the pod's own env"
    )
    inside = rig.kubectl(
        "exec", "one", "-n", namespace, "--", "cat", "/etc/ld.so.preload", "/proc/self/mounts"
    )
    assert inside.startswith(f"{rig.library}/lib/libvalve-")
    mounts = [line.split() for line in inside.splitlines()[1:]]
    assert [fields[3].split(",")[0] for fields in mounts if fields[1] == rig.library] == ["ro"]


def test_container_restart(rig: PluginRig, namespace: str) -> None:
    """Keeps device plugin assignments across pod restarts (no kubelet restart, no device plugin restart)."""
    rig.start(namespace, "one")
    rig.until_phase(namespace, "one", "Running")
    held, said = rig.devices(namespace, "one"), rig.said(namespace, "one")
    rig.restart_container(namespace, "one")
    assert (rig.devices(namespace, "one"), rig.said(namespace, "one")) == (held, said)
    start_beside(rig, namespace, held["main"])


def test_kubelet_restart(rig: PluginRig, namespace: str) -> None:
    """Keeps device plugin assignments across kubelet restarts (no pod restart, no device plugin restart)."""
    rig.start(namespace, "one")
    rig.until_phase(namespace, "one", "Running")
    held = rig.devices(namespace, "one")
    rig.restart_kubelet()
    rig.until_offline(TOTAL, TOTAL)
    rig.until_phase(namespace, "one", "Running")
    assert rig.restarts(namespace, "one") == 0
    rig.until_devices(namespace, "one", held)
    start_beside(rig, namespace, held["main"])


def test_container_and_kubelet_restart(rig: PluginRig, namespace: str) -> None:
    """Keeps device plugin assignments across pod and kubelet restarts (no device plugin restart)."""
    rig.start(namespace, "one")
    rig.until_phase(namespace, "one", "Running")
    held, said = rig.devices(namespace, "one"), rig.said(namespace, "one")
    rig.restart_container(namespace, "one")
    rig.restart_kubelet()
    rig.until_offline(TOTAL, TOTAL)
    rig.until_devices(namespace, "one", held)
    assert rig.said(namespace, "one") == said


def test_succeeded_pod(rig: PluginRig, namespace: str) -> None:
    """will not attempt to admit the succeeded pod after the kubelet restart and device plugin removed"""
    rig.start(namespace, "one", script=BRIEFLY, restartPolicy="Never")
    finalizers = {"metadata": {"finalizers": ["valve.test/keep"]}}
    rig.kubectl("patch", "pod", "one", "-n", namespace, "--type=merge", "-p", json.dumps(finalizers))
    rig.until_phase(namespace, "one", "Succeeded")
    rig.stop_plugin()
    rig.until_offline(0, TOTAL)
    rig.restart_kubelet()
    deadline = time.monotonic() + 6  # three of the node's status reports
    while time.monotonic() < deadline:
        assert rig.kubectl.get("pod", "one", "-n", namespace)["status"]["phase"] == "Succeeded"
        time.sleep(0.5)
    rig.kubectl(
        "patch", "pod", "one", "-n", namespace, "--type=merge", "-p", '{"metadata": {"finalizers": null}}'
    )


def test_plugin_restart(rig: PluginRig, namespace: str) -> None:
    """Keeps device plugin assignments after the device plugin has restarted (no kubelet restart ...)."""
    rig.start(namespace, "one")
    rig.until_phase(namespace, "one", "Running")
    held, said = rig.devices(namespace, "one"), rig.said(namespace, "one")
    rig.stop_plugin()
    rig.until_offline(0, TOTAL)
    rig.start_plugin()
    rig.until_offline(TOTAL, TOTAL)
    rig.restart_container(namespace, "one")
    assert (rig.devices(namespace, "one"), rig.said(namespace, "one")) == (held, said)
    start_beside(rig, namespace, held["main"])
    assert {(namespace, "one", "main"), (namespace, "two", "main")} <= rig.owners()


def test_kubelet_and_plugin_restart(rig: PluginRig, namespace: str) -> None:
    """Keeps device plugin assignments after kubelet restart and device plugin restart (no pod restart)."""
    rig.start(namespace, "one")
    rig.until_phase(namespace, "one", "Running")
    held = rig.devices(namespace, "one")
    rig.restart_kubelet()
    rig.stop_plugin()
    rig.start_plugin()
    rig.until_offline(TOTAL, TOTAL)
    rig.until_phase(namespace, "one", "Running")
    assert rig.restarts(namespace, "one") == 0
    rig.until_devices(namespace, "one", held)
    assert (namespace, "one", "main") in rig.owners()


def test_orphaned_pod(rig: PluginRig, namespace: str) -> None:
    """Ensures pods consuming devices deleted while kubelet is down are cleaned up correctly."""
    rig.start(namespace, "one", gib=TOTAL // 2)
    uid = rig.until_phase(namespace, "one", "Running")["metadata"]["uid"]
    folder = rig.node.path(f"/var/lib/kubelet/pods/{uid}")
    assert folder.exists()
    rig.node.stop_kubelet()
    rig.kubectl("delete", "pod", "one", "-n", namespace, "--grace-period=0", "--force")
    rig.start_kubelet()
    rig.until_offline(TOTAL, TOTAL)
    wait_for("the kubelet forgets the pod", lambda: not folder.exists(), 60)
    rig.start(namespace, "two", gib=TOTAL // 2)
    rig.start(namespace, "three", gib=TOTAL // 2)
    for name in ("two", "three"):
        rig.until_phase(namespace, name, "Running")
    assert not rig.devices(namespace, "one")
    assert rig.owners() >= {(namespace, "two", "main"), (namespace, "three", "main")}
    assert (namespace, "one", "main") not in rig.owners()


def test_restartable_init_container(rig: PluginRig, namespace: str) -> None:
    """Can schedule a pod with a restartable init container."""
    rig.start(
        namespace, "one",
        initContainers=[
            container("init-1", 1, SHORT_INIT), container("sidecar-2", 1, FOREVER, restartPolicy="Always"),
        ],
        containers=[container("regular-1", 1, FOREVER)],
    )  # fmt: skip
    rig.until_phase(namespace, "one", "Running")
    held = {name: ids for name, ids in rig.devices(namespace, "one").items() if ids}
    assert {name: len(ids) for name, ids in held.items()} == {"sidecar-2": 1, "regular-1": 1}
    assert held["sidecar-2"] != held["regular-1"]
    for name in held:
        assert rig.said(namespace, "one", name)["VALVE_MEMORY_GIB"] == "1"
    assert {(namespace, "one", name) for name in held} <= rig.owners()


def test_reboot(rig: PluginRig, namespace: str) -> None:
    """Does not keep device plugin assignments across node reboots if fails admission."""
    rig.start(namespace, "one")
    rig.until_phase(namespace, "one", "Running")
    rig.reboot()
    failed = rig.until_phase(namespace, "one", "Failed")
    assert failed["status"]["reason"] == "UnexpectedAdmissionError"
    rig.kubectl.until("released", ["node", rig.node.name], lambda _: not rig.devices(namespace, "one"))
    rig.start_plugin()
    rig.until_offline(TOTAL, TOTAL)
    rig.kubectl.until(
        "forgotten", ["node", rig.node.name], lambda _: (namespace, "one", "main") not in rig.owners()
    )


def test_storm(rig: PluginRig, namespace: str) -> None:
    """Fifty pods at once ask for six times what there is (no scenario there): what fits runs, each with what
    it asked for, on its own GPU; the others stay Pending, and nobody fails."""
    asked = {f"storm-{number:02}": 1 + number % 3 for number in range(50)}
    pods = [pod(namespace, name, gib, FOREVER) for name, gib in asked.items()]
    rig.kubectl.apply({"apiVersion": "v1", "kind": "List", "items": pods})

    def phases() -> dict[str, str]:
        return {
            found["metadata"]["name"]: found["status"]["phase"]
            for found in rig.kubectl.items("pods", "-n", namespace)
        }

    def settled() -> bool:
        running = [name for name, phase in phases().items() if phase == "Running"]
        return sum(asked[name] for name in running) == TOTAL

    wait_for("all memory is given", settled, 120)
    seen = phases()
    assert set(seen.values()) == {"Running", "Pending"}
    running = [name for name, phase in seen.items() if phase == "Running"]
    entries = {entry["owner"]["pod"]: entry for entry in rig.allocations() if entry["owner"]}
    ids = [one for name in running for one in rig.devices(namespace, name)["main"]]
    assert len(ids) == len(set(ids)) == TOTAL
    for name in running:
        said = rig.said(namespace, name)
        assert int(said["VALVE_MEMORY_GIB"]) == asked[name] == entries[name]["memory_gib"]
        assert [said["VALVE_GPU"]] == entries[name]["gpus"]
    waiting = next(name for name, phase in seen.items() if phase == "Pending")
    (scheduled,) = rig.kubectl.get("pod", waiting, "-n", namespace)["status"]["conditions"]
    assert f"Insufficient {OFFLINE}" in scheduled["message"]


def start_beside(rig: PluginRig, namespace: str, held: list[str]) -> None:
    """Start pod `two`: it gets ids, and none of those that are held."""
    rig.start(namespace, "two")
    rig.until_phase(namespace, "two", "Running")
    assert not set(rig.devices(namespace, "two")["main"]) & set(held)


SHORT_INIT = BRIEFLY.replace("sleep 1", "true")
