# SPDX-License-Identifier: Apache-2.0
"""The nvidia device on a node of a real cluster, by the chart: annotated pods share its GPUs.

Device: fake (the driver; everything above it is what ships). Aspects: the policy is Ready and the node says
its GPUs and route; a container has the GPU that the device plugin gave it, and without one it has none; the
kernel of offline stands still while online is busy, by its own stamps, and goes on; its memory ends where the
annotation says; a process that cannot be paused is ended, and who reads the logs learns why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import fakenv
from e2e.cluster.cluster import Cluster
from e2e.cluster.kubectl import Kubectl, is_ready
from e2e.cluster.processes import wait_for
from e2e.scenarios.kubernetes import gpu_rig, product
from e2e.scenarios.kubernetes.gpu_rig import OFFLINE, ONLINE, UUIDS, GpuPod

QUIET_S = 0.3
PATIENCE_S = 30
pytestmark = pytest.mark.timeout(600)
NewPod = Callable[..., GpuPod]


@pytest.fixture
def kubectl(gpu_cluster: Cluster) -> Kubectl:
    return gpu_cluster.kubectl


@pytest.fixture
def new_pod(gpu_cluster: Cluster, kubectl: Kubectl, machine: fakenv.Machine) -> Iterator[NewPod]:
    """new_pod(name, annotations): a pod that answers; gone at the end of the test.

    The device plugin places pods by what others hold; a pod that is gone counts for some seconds more."""
    (node,) = gpu_cluster.nodes
    wait_for("earlier pods hold nothing", lambda: not product.allocations(node), PATIENCE_S)
    with ExitStack() as stack:

        def make(name: str, annotations: dict[str, str], driver: Path | None = None) -> GpuPod:
            gone = ("delete", "pod", name, "-n", gpu_rig.NAMESPACE, "--ignore-not-found", "--grace-period=1")
            stack.callback(kubectl, *gone)
            made = GpuPod(kubectl, machine, gpu_rig.NAMESPACE, name, annotations, driver)
            stack.callback(made.close)
            return made

        yield make


def stands(pod: GpuPod, for_s: float = QUIET_S) -> bool:
    before = pod.stamp()
    time.sleep(for_s)
    return pod.stamp() == before


AGENT = ("-n", product.NAMESPACE, "-l", "app.kubernetes.io/component=agent")


def agent_log(kubectl: Kubectl) -> str:
    return kubectl("logs", *AGENT, "--tail=-1")


def events(kubectl: Kubectl, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in agent_log(kubectl).splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == name]


def said_of(kubectl: Kubectl, pod: str, reason: str) -> str:
    """The message of a pod's event, as `kubectl describe pod` shows it."""
    uid = kubectl.get("pod", pod, "-n", gpu_rig.NAMESPACE)["metadata"]["uid"]
    about = f"involvedObject.uid={uid},reason={reason}"

    def there(events: dict[str, Any]) -> bool:
        return bool(events["items"])

    kubectl.until("the event", ["events", "-n", gpu_rig.NAMESPACE, f"--field-selector={about}"], there)
    described = kubectl("describe", "pod", pod, "-n", gpu_rig.NAMESPACE)
    assert reason in described
    return described


def replace_agent(kubectl: Kubectl) -> None:
    """As an upgrade does: the pod is deleted, the DaemonSet makes another, which is ready afterwards."""
    (old,) = kubectl.items("pods", *AGENT)
    kubectl("delete", "pod", old["metadata"]["name"], "-n", product.NAMESPACE)

    def ready(pods: dict[str, Any]) -> bool:
        return any(
            pod["metadata"]["uid"] != old["metadata"]["uid"]
            and all(status["ready"] for status in pod["status"].get("containerStatuses", [{"ready": False}]))
            for pod in pods["items"]
        )

    kubectl.until("another agent is ready", ["pods", *AGENT], ready)


def test_the_policy_is_ready_and_the_node_says_its_gpu(gpu_cluster: Cluster, kubectl: Kubectl) -> None:
    kubectl.until("the policy is Ready", ["colo", "gpus"], is_ready)
    gpus = kubectl.get("colonode", gpu_cluster.nodes[0].name)["status"]["gpus"]
    said = [(gpu["id"], gpu["model"], gpu["route"]) for gpu in gpus]
    assert said == [(uuid, "NVIDIA Fake GPU", "agent") for uuid in UUIDS]
    assert kubectl("get", "colo").splitlines()[1].split()[0] == "gpus"


def test_the_agents_container_has_what_the_device_needs(kubectl: Kubectl) -> None:
    """What `valve doctor` says where the chart put the agent: driver, files, libraries, rights."""
    (agent,) = kubectl.items("pods", *AGENT)
    doctor = ("python3", "-m", "valve_cli.main", "doctor")
    said = kubectl("exec", agent["metadata"]["name"], "-n", product.NAMESPACE, "--", *doctor)
    (section,) = [part.splitlines() for part in said.split("\n\n") if part.startswith("nvidia\n")]
    findings = {line[10:].split("  ")[0]: line.split()[0] for line in section[1:]}
    assert findings == dict.fromkeys(
        ("driver", "layouts", "device files", "libcuda", "GPU 0", "GPU 1"), "ok"
    ), said
    assert "\nroute:  agent\n" in said


def test_a_container_has_the_gpu_that_it_was_given(gpu_cluster: Cluster, new_pod: NewPod) -> None:
    look = """
        import os
        def opens(path):
            try: os.close(os.open(path, os.O_RDWR)); return 0
            except OSError as error: return error.errno
        result = [opens(f"/dev/nvidia{name}") for name in ("ctl", "-uvm", "0", "1")]
    """.replace("\n        ", "\n")
    assert new_pod("plain", {}).run(look) == [2, 2, 2, 2]
    pods = [new_pod(name, OFFLINE) for name in ("one", "two")]  # a GPU has no room for both
    found = {pod.gpu: pod.run(look) for pod in pods}
    assert found == {UUIDS[0]: [0, 0, 0, 2], UUIDS[1]: [0, 0, 2, 0]}


def test_offline_yields_to_online(gpu_cluster: Cluster, kubectl: Kubectl, new_pod: NewPod) -> None:
    online, offline = new_pod("online", ONLINE), new_pod("offline", OFFLINE)
    assert offline.gpu == online.gpu
    online.run(gpu_rig.ENGINE)
    offline.launch()
    wait_for("the kernel runs", lambda: not stands(offline), PATIENCE_S)
    online.run("valve.busy()")
    wait_for("its channels are taken off the GPU", offline.is_held, PATIENCE_S)
    assert stands(offline, 3.0), "as long as online is busy"

    def told(node: dict[str, Any]) -> bool:
        (gpu,) = [gpu for gpu in node["status"]["gpus"] if gpu["id"] == online.gpu]
        names = {tenant["name"]: tenant["workload"] for tenant in gpu["tenants"]}
        both = {f"{gpu_rig.NAMESPACE}/offline": "offline", f"{gpu_rig.NAMESPACE}/online": "online"}
        return names == both and gpu["paused"] and gpu["preemptions"] >= 1 and gpu["route"] == "agent"

    kubectl.until("the node tells it", ["colonode", gpu_cluster.nodes[0].name], told)
    online.run("valve.idle(0)")
    wait_for("the kernel goes on", lambda: not stands(offline), PATIENCE_S)


def test_each_gpu_is_shared_by_itself(gpu_cluster: Cluster, kubectl: Kubectl, new_pod: NewPod) -> None:
    online, beside = new_pod("online", ONLINE), new_pod("beside", OFFLINE)
    apart = new_pod("apart", OFFLINE)
    assert {online.gpu, apart.gpu} == set(UUIDS)
    assert beside.gpu == online.gpu
    online.run(gpu_rig.ENGINE)
    for pod in (beside, apart):
        pod.launch()
    online.run("valve.busy()")
    wait_for("its neighbour is taken off the GPU", beside.is_held, PATIENCE_S)

    def told(node: dict[str, Any]) -> bool:
        return {gpu["id"]: gpu["paused"] for gpu in node["status"]["gpus"]} == {
            online.gpu: True,
            apart.gpu: False,
        }

    kubectl.until("the node tells it", ["colonode", gpu_cluster.nodes[0].name], told)
    assert stands(beside, 1.0)
    assert not apart.is_held()
    wait_for("the other GPU's kernel runs", lambda: not stands(apart), PATIENCE_S)
    online.run("valve.idle(0)")
    wait_for("the kernel goes on", lambda: not stands(beside), PATIENCE_S)


def test_without_an_agent_offline_stands_and_the_next_one_lets_it_go_on(
    kubectl: Kubectl, new_pod: NewPod
) -> None:
    online, offline = new_pod("online", ONLINE), new_pod("offline", OFFLINE)
    assert offline.gpu == online.gpu
    online.run(gpu_rig.ENGINE)
    offline.launch()
    online.run("valve.busy()")
    wait_for("its channels are taken off the GPU", offline.is_held, PATIENCE_S)
    before = offline.stamp()
    replace_agent(kubectl)
    assert offline.stamp() == before, "not one block ran in between"
    assert stands(offline, 3.0), "the new agent knows that online is busy"
    online.run("valve.idle(0)")
    wait_for("the same kernel goes on", lambda: not stands(offline), PATIENCE_S)
    for pod in (offline, online):
        assert pod.restarts() == 0


def test_offline_memory_ends_where_the_annotation_says(new_pod: NewPod) -> None:
    offline = new_pod("offline", OFFLINE)
    free, total = offline.run("import driver_api; cu = driver_api.Cuda(); result = list(cu.info())")
    assert total == 1 << 30
    assert 0 < free <= total
    assert offline.run("result = cu.code('cuMemAlloc_v2', driver_api.ctypes.byref("
                       "driver_api.ctypes.c_uint64()), total := 2 << 30)") == 2  # fmt: skip


def test_a_process_that_cannot_be_paused_is_ended_and_says_why(
    kubectl: Kubectl, machine: fakenv.Machine, new_pod: NewPod
) -> None:
    offline = new_pod("offline", OFFLINE)
    offline.start(
        "import ctypes; ctypes.CDLL('libcuda.so.1', mode=8 | 2)\n"  # RTLD_DEEPBIND: past libvalve
        "import driver_api; cu = driver_api.Cuda(); cu.alloc(32 << 20)\n"
        f"cu.launch('spin_us', {gpu_rig.LONG_US}); cu.synchronize()"
    )
    ended = offline.until("ends", lambda pod: pod["status"]["phase"] == "Failed")
    (status,) = ended["status"]["containerStatuses"]
    assert status["state"]["terminated"]["exitCode"] == 137
    assert "libvalve saw none of its channels" in agent_log(kubectl)
    assert "libvalve saw none of its channels" in said_of(kubectl, "offline", "ValveKilled")
    wait_for("its channels go", lambda: not offline.pids(), PATIENCE_S)


def test_a_process_of_no_tenant_is_named(
    gpu_cluster: Cluster, kubectl: Kubectl, machine: fakenv.Machine, new_pod: NewPod
) -> None:
    """A privileged pod has every device of the node, whatever Valve gave to whom."""
    stranger = new_pod("stranger", {}, driver=machine.folder)
    stranger.run("import driver_api; cu = driver_api.Cuda(); cu.alloc(32 << 20)")
    wait_for("the agent says so", lambda: bool(events(kubectl, "unknown-process")), PATIENCE_S)
    said = events(kubectl, "unknown-process")
    assert {entry["pid"] for entry in said} == {stranger.pid_on_node()}
    assert "belongs to no tenant" in said[0]["why"]
    assert "belongs to no tenant" in said_of(kubectl, "stranger", "ValveUnknownProcess")
    assert stranger.run("result = cu.info()[1]") == gpu_rig.GPU_MIB << 20, "it is not ours to end"


def test_what_the_driver_refuses_to_stop_is_ended_where_no_other_route_is_allowed(
    gpu_cluster: Cluster, kubectl: Kubectl, machine: fakenv.Machine, new_pod: NewPod
) -> None:
    wanted = {"spec": {"compute": {"route": "agent"}, "guardrails": {"pauseTimeout": "300ms"}}}
    kubectl("patch", "colo", "gpus", "--type=merge", "-p", json.dumps(wanted))
    kubectl.until(
        "the node's settings",
        ["colonode", gpu_cluster.nodes[0].name],
        lambda node: node["spec"]["compute"]["route"] == "agent",
    )
    replace_agent(kubectl)  # a route is chosen at its start
    online, offline = new_pod("online", ONLINE), new_pod("offline", OFFLINE)
    assert offline.gpu == online.gpu
    online.run(gpu_rig.ENGINE)
    offline.launch()
    wait_for("the kernel runs", lambda: not stands(offline), PATIENCE_S)
    machine.ctl("deny", "control", "0x2080110b", "0x1b")
    try:
        online.start("valve.busy()")
        offline.until("ends", lambda pod: pod["status"]["phase"] == "Failed")
    finally:
        machine.ctl("clear")
    log = agent_log(kubectl)
    assert "a privilege is missing" in log
    assert "must not share the device" in log
    assert "must not share the device" in said_of(kubectl, "offline", "ValveKilled")
    assert online.restarts() == 0
