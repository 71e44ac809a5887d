# SPDX-License-Identifier: Apache-2.0
"""The cluster itself: pods run and reach each other and the API, and nothing of it outlives a killed test."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from e2e.cluster.images import small
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.node import Node

ROOT = Path(__file__).resolve().parents[3]
SERVE = "mkdir /w; echo from-$HOSTNAME > /w/index.html; exec httpd -f -p 8080 -h /w"
START_AND_WAIT = """
import os, sys, time
from e2e.cluster.cluster import Cluster
cluster = Cluster()
pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [
    {"name": "c", "image": "valve.test/busybox:1", "command": ["sleep", "600"]}]}}
cluster.kubectl.until("account", ["sa", "default"], lambda _: True)
cluster.kubectl.apply(pod)
cluster.kubectl.until("Running", ["pod", "p"], lambda pod: pod["status"].get("phase") == "Running")
print(cluster.state, cluster.network.interface, cluster.nodes[0].cgroup,
      cluster.nodes[0].supervisor.pid, cluster.plane.supervisor.pid, flush=True)
time.sleep(600)
"""


def pod(name: str, namespace: str, *command: str, image: str = small.BUSYBOX, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"terminationGracePeriodSeconds": 0,
                 "containers": [{"name": "main", "image": image, "command": list(command)}]} | spec,
    }  # fmt: skip


def running(found: dict[str, Any]) -> bool:
    return bool(found["status"].get("phase") == "Running")


def test_two_pods_run_and_reach_each_other(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply(*(pod(name, namespace, "sh", "-c", SERVE) for name in ("one", "two")))
    found = {
        name: kubectl.until("Running", ["pod", name, "-n", namespace], running) for name in ("one", "two")
    }
    for name, other in (("one", "two"), ("two", "one")):
        address = found[other]["status"]["podIP"]
        # nc, for Debian's static wget crashes in its resolver; until, for Running is not yet listening
        request = r"printf 'GET / HTTP/1.0\r\n\r\n'"
        ask = f"until {request} | nc -w 5 {address} 8080 | tail -n 1; do sleep 0.1; done"
        said = kubectl("exec", "-n", namespace, name, "--", "sh", "-o", "pipefail", "-c", ask, timeout_s=30)
        assert said == f"from-{other}\n"


def test_a_pod_reaches_the_api_at_its_service_address(kubectl: Kubectl, namespace: str) -> None:
    """Without kube-proxy: the control plane listens on the address itself."""
    found = kubectl.apply(pod("one", namespace, "sleep", "600"))
    assert "created" in found
    kubectl.until("Running", ["pod", "one", "-n", namespace], running)
    connect = 'nc -w 5 "$KUBERNETES_SERVICE_HOST" "$KUBERNETES_SERVICE_PORT" < /dev/null && echo open'
    assert kubectl("exec", "-n", namespace, "one", "--", "sh", "-c", connect) == "open\n"


def test_the_nodes_folders_are_where_plugins_expect_them(own_node: Node) -> None:
    for place in (
        "/var/lib/kubelet/device-plugins/kubelet.sock",
        "/var/lib/kubelet/pod-resources/kubelet.sock",
    ):
        assert own_node.path(place).is_socket(), place
        own_node.supervisor.run(["test", "-S", place])
        assert not Path(place).exists(), "the machine's own folder is untouched"


def test_the_kubelet_leaves_the_machines_settings_alone(own_node: Node) -> None:
    """It finds its wishes fulfilled inside, and this machine's values are whatever they were."""
    assert own_node.supervisor.run(["cat", "/proc/sys/kernel/panic"]) == "10\n"
    assert Path("/proc/sys/kernel/panic").read_text() != "10\n"


def test_a_killed_test_leaves_no_cluster(own_node: Node) -> None:
    """SIGKILL while a container runs: no process, mount, interface, cgroup or folder is left."""
    del own_node  # skips on a foreign cluster
    test = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert test.stdout
    state, interface, cgroup, *inits = test.stdout.readline().split()
    owned = [psutil.Process(int(pid)) for pid in inits]
    owned += [child for init in owned for child in init.children(recursive=True)]
    assert {"kube", "containerd", "containerd-shim-runc-v2", "pause", "sleep"} <= {
        own.name() for own in owned
    }
    assert Path("/sys/class/net", interface).exists()
    test.send_signal(signal.SIGKILL)
    test.wait()
    test.stdout.close()
    _, alive = psutil.wait_procs(owned, timeout=20)
    assert not alive
    deadline = time.monotonic() + 20
    left = ["unknown"]
    while left and time.monotonic() < deadline:
        places = [Path(state), Path("/sys/class/net", interface), *Path("/sys/fs/cgroup").glob(f"*/{cgroup}")]
        left = [str(place) for place in places if place.exists()]
        time.sleep(0.1)
    assert not left
    assert state not in Path("/proc/self/mountinfo").read_text()
