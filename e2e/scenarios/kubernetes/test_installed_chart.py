# SPDX-License-Identifier: Apache-2.0
"""The chart with its pods running: `helm test`, and what those pods may do, as the kernel says.

The name sorts after the device plugin's scenarios, which want a node without Valve, and before those that
break and remove it. Device: cpu.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest

from e2e.cluster.cluster import Cluster
from e2e.cluster.foreign import ForeignCluster
from e2e.cluster.images import small
from e2e.cluster.kubectl import Kubectl
from e2e.scenarios.kubernetes import product

pytestmark = pytest.mark.usefixtures("installed")
NO_CAPABILITIES = "0000000000000000"


def test_helm_test_passes(cluster: Cluster | ForeignCluster) -> None:
    """Through the real webhook, by its certificate, with the rights of the chart's test account."""
    report = product.helm(cluster, "test", "valve", "-n", product.NAMESPACE, "--logs", "--timeout=120s")
    log = report.rpartition("POD LOGS")[2]  # helm prints the pod's log once for every hook of its name
    lines = [line for line in log.splitlines() if line.startswith(("ok ", "FAIL "))]
    assert [line.split()[0] for line in lines] == ["ok"] * 5, report
    assert "1 nodes offer valve.io/online-gpu" in report


COMPONENTS = ("operator", "device-plugin", "agent")


def inside(kubectl: Kubectl, component: str, expression: str) -> str:
    """What a Python expression says in a component's container; `status` is /proc/self/status."""
    label = f"app.kubernetes.io/component={component}"
    (pod, *_) = kubectl.items("pods", "-n", product.NAMESPACE, "-l", label)
    script = (
        "import os; lines = open('/proc/self/status').read().splitlines(); "
        f"status = dict(line.split(':\\t') for line in lines); print({expression})"
    )
    return kubectl(
        "exec", "-n", product.NAMESPACE, pod["metadata"]["name"], "--", "python3", "-c", script
    ).strip()


@pytest.mark.parametrize(
    ("component", "uid", "capable"),
    [("operator", "65532", False), ("device-plugin", "0", False), ("agent", "0", True)],
)
def test_the_kernel_sees_what_the_chart_says(
    kubectl: Kubectl, component: str, uid: str, capable: bool
) -> None:
    """uid, effective capabilities, seccomp filter, no_new_privs."""
    said = inside(
        kubectl,
        component,
        "status['Uid'].split()[0], status['CapEff'], status['Seccomp'], status['NoNewPrivs']",
    )
    found_uid, capabilities, seccomp, no_new_privileges = said.split()
    assert found_uid == uid
    assert (capabilities != NO_CAPABILITIES) == capable
    assert (seccomp, no_new_privileges) == (("0", "0") if capable else ("2", "1"))


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_container_cannot_change_its_own_image(kubectl: Kubectl, component: str) -> None:
    assert inside(kubectl, component, "bool(os.statvfs('/').f_flag & os.ST_RDONLY)") == "True"


@pytest.mark.parametrize(
    ("component", "has"), [("operator", True), ("agent", True), ("device-plugin", False)]
)
def test_the_device_plugin_has_no_token(kubectl: Kubectl, component: str, has: bool) -> None:
    place = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    assert inside(kubectl, component, f"os.path.exists('{place}')") == str(has)


STARTS = 5
OFFLINE = {"valve.io/workload": "offline", "valve.io/gpu-memory": "1Gi"}


def test_the_runtime_costs_a_pod_little_time(kubectl: Kubectl, namespace: str) -> None:
    """From the request that creates a pod to the end of its program, with and without Valve, in turns."""
    took_s: dict[str, list[float]] = {"plain": [], "offline": []}
    for number in range(STARTS):
        for kind, marks in (("plain", {}), ("offline", OFFLINE)):
            name = f"{kind}-{number}"
            begun_s = time.monotonic()
            kubectl.apply(printer(namespace, name, marks))
            kubectl.until(
                f"{name} ended",
                ["pod", name, "-n", namespace],
                lambda pod: pod["status"]["phase"] == "Succeeded",
            )
            took_s[kind].append(time.monotonic() - begun_s)
            preload = kubectl("logs", name, "-n", namespace).strip()
            assert preload.startswith("/opt/valve/") == bool(marks), preload
            kubectl("delete", "pod", name, "-n", namespace, "--wait=true")
    medians = {kind: statistics.median(times) for kind, times in took_s.items()}
    print(f"created to ended, p50 of {STARTS}: {medians} s (device: cpu)")


def ended(pod: dict[str, Any]) -> bool:
    return bool(pod["status"]["phase"] == "Succeeded")


def printer(namespace: str, name: str, marks: dict[str, str]) -> dict[str, Any]:
    """A pod that says which libraries are preloaded into it."""
    script = "cat /etc/ld.so.preload 2>/dev/null || echo nothing"
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "annotations": marks},
        "spec": {
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": small.BUSYBOX, "command": ["sh", "-c", script]}],
        },
    }  # fmt: skip
