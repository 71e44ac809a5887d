# SPDX-License-Identifier: Apache-2.0
"""Valve on a cluster as an administrator puts it there: images, `helm install`, a policy. And off again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.cluster import Cluster
from e2e.cluster.errors import ClusterError
from e2e.cluster.foreign import ForeignCluster
from e2e.cluster.images import product
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.node import Node
from e2e.cluster.programs import program
from valve_api.node_socket import read_json

ROOT = Path(__file__).resolve().parents[3]
NAMESPACE = "valve-system"
LABEL = "valve.io/e2e"
NODE_READY_S = 240
ALLOCATIONS = "/var/lib/valve/device-plugin/allocations.sock"
POLICY: dict[str, Any] = {
    "apiVersion": "valve.io/v1alpha1",
    "kind": "ColocationPolicy",
    "metadata": {"name": "e2e"},
    "spec": {
        "nodeSelector": {LABEL: "true"},
        "cpuDevice": {"memory": "1152Mi"},
        "compute": {"lease": "2s", "recoveryGrace": "500ms", "cooldown": {"min": "5ms", "max": "100ms"}},
        "memory": {"slabSize": "32Mi", "reservation": {"min": "64Mi", "max": "128Mi", "quietPeriod": "10s"}},
        "offline": {"defaultMemory": "100%"},
    },
}
"""A device of 36 slabs: a GiB for offline, and so little beside it that online soon takes some back."""


def helm(cluster: Cluster | ForeignCluster, *arguments: str | Path) -> str:
    """Run helm. Raises AssertionError with what it printed."""
    done = subprocess.run(
        [program("helm"), f"--kubeconfig={cluster.kubeconfig}", *arguments], capture_output=True, text=True,
        check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(
    cluster: Cluster | ForeignCluster,
    policy: dict[str, Any] = POLICY,
    device: str = "cpu",
    values: Path | None = None,
    gpus: int = 1,
) -> None:
    """Returns when the operator answers and the policy's node offers a seat and a GiB of each GPU.

    values  a file of chart values, for what a device needs
    """
    cluster.load_image(product.build())
    kubectl = cluster.kubectl
    kubectl("label", "node", "--all", f"{LABEL}=true", "--overwrite")
    more = [f"--values={values}"] if values else []
    helm(
        cluster, "install", "valve", ROOT / "charts/valve", "-n", NAMESPACE, "--create-namespace", "--wait",
        "--timeout=120s", f"--set=image.registry={product.REGISTRY},operator.replicas=1",
        f"--set=agent.device={device},devicePlugin.injection=cdi", *more,
    )  # fmt: skip
    kubectl.apply(policy)

    def offers(nodes: dict[str, Any]) -> bool:
        found = [
            node["status"]["allocatable"] for node in nodes["items"] if LABEL in node["metadata"]["labels"]
        ]
        return all(
            int(node.get("valve.io/online-gpu", 0)) == gpus
            and int(node.get("valve.io/offline-memory-gib", 0)) == gpus
            for node in found
        )

    kubectl.until("every node offers a seat and a GiB of each GPU", ["nodes"], offers, NODE_READY_S)


@dataclass(frozen=True)
class Release:
    """A later version of this checkout."""

    version: str
    chart: Path
    images: Path


def release(version: str, folder: Path) -> Release:
    """Builds a version as its maintainers would: the sources with another number, and nothing else new."""
    sources = folder / version
    unwanted = shutil.ignore_patterns("build", "out", ".*", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, sources, ignore=unwanted)
    for file, line in (("pyproject.toml", 'version = "{}"'), ("charts/valve/Chart.yaml", "appVersion: {}")):
        text = (sources / file).read_text()
        old = line.format(product.version())
        assert text.count(f"\n{old}\n") == 1, f"{file} has one line {old}"
        (sources / file).write_text(text.replace(old, line.format(version)))
    make = "from e2e.cluster.images import product; print(product.build())"
    for command in (["runtime/build.py", "--out", "build/runtime"], ["-c", make]):
        done = subprocess.run(
            [sys.executable, *command], cwd=sources, env={**os.environ, "PYTHONPATH": str(sources)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return Release(version, sources / "charts/valve", Path(done.stdout.splitlines()[-1]))


def upgrade(cluster: Cluster, newer: Release) -> None:
    """`helm upgrade`, and until every pod of the installation is the new version's and ready."""
    cluster.load_image(newer.images)
    helm(
        cluster, "upgrade", "valve", newer.chart, "-n", NAMESPACE, "--reuse-values", "--wait",
        "--timeout=120s",
    )  # fmt: skip

    def rolled(pods: dict[str, Any]) -> bool:
        components = {}
        for pod in pods["items"]:
            (status, *_) = pod["status"].get("containerStatuses") or [{"ready": False}]
            image = pod["spec"]["containers"][0]["image"]
            components[pod["metadata"]["name"]] = status["ready"] and image.endswith(f":{newer.version}")
        return len(components) >= len(product.COMPONENTS) and all(components.values())

    chosen = ["pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component"]
    cluster.kubectl.until(f"every component is {newer.version}", chosen, rolled, 120)


def uninstall(cluster: Cluster | ForeignCluster) -> None:
    cluster.kubectl("delete", "colo", "--all", "--wait=false")
    helm(cluster, "uninstall", "valve", "-n", NAMESPACE, "--wait", "--timeout=90s")


def allocations(node: Node) -> list[dict[str, Any]]:
    """What the device plugin's ledger has given away, fresh."""
    found: list[dict[str, Any]] = read_json(node.path(ALLOCATIONS), 10)["allocations"]
    return found


def restarts(kubectl: Kubectl) -> str:
    """Which containers of Valve ended and were started again, with the last they said: for the report of a
    failed test, which may itself have taken the cluster away."""
    said = []
    try:
        for pod in kubectl.items("pods", "-n", NAMESPACE):
            name = pod["metadata"]["name"]
            for status in pod["status"].get("containerStatuses", []):
                if status["restartCount"]:
                    said.append(f"--- {name} was restarted: {status['lastState']}")
                    chosen = (name, "-c", status["name"], "-n", NAMESPACE)
                    said.append(kubectl("logs", *chosen, "--previous", "--tail=5"))
    except (ClusterError, subprocess.TimeoutExpired) as error:
        said.append(f"(nothing more can be asked: {error})")
    return "\n".join(said)
