# SPDX-License-Identifier: Apache-2.0
"""A node without a kubelet: a real agent with `--node`, a real API server, real cgroups, and a stand-in that
answers pod-resources and links logs as a kubelet does. Tenants are started as a container runtime would."""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kubelet_stand_in import FakeKubelet, Node

from e2e.cluster.kubectl import Kubectl
from valve_api.container import ContainerName
from valve_cli.bench.rig import TENANT, LiveAgent, TenantProcess, wait_for
from valve_cli.run import child_environment

SLAB = 2 << 20
SLABS = 64
SPEC: dict[str, Any] = {
    "policy": {"name": "inference", "generation": 1},
    "cpuDevice": {"memory": f"{SLABS * 2}Mi"},
    "compute": {"lease": "400ms", "recoveryGrace": "500ms", "cooldown": {"min": "20ms", "max": "200ms"}},
    "memory": {
        "slabSize": "2Mi", "onlineFloor": "0%",
        "reservation": {"min": "2Mi", "max": "16Mi", "quietPeriod": "60s"},
    },
    "offline": {"defaultMemory": "100%"},
}  # fmt: skip


def colocation_node(name: str, **spec: Any) -> dict[str, Any]:
    """The object that the operator would write."""
    return {
        "apiVersion": "valve.io/v1alpha1", "kind": "ColocationNode", "metadata": {"name": name},
        "spec": {**SPEC, **spec},
    }  # fmt: skip


def hierarchy() -> Path | None:
    """Where cgroups can be made here: cgroup v2's tree, or one of v1's; None: nowhere."""
    for top in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")):
        if (top / "cgroup.procs").exists() and os.access(top, os.W_OK):
            return top
    return None


class NodeAgent(LiveAgent):
    """`valve agent --node`."""

    def __init__(self, folder: Path, node: str, kubeconfig: Path, *arguments: str) -> None:
        super().__init__(folder, "", arguments=arguments)
        self.node = node
        self.kubelet = FakeKubelet(folder / "kubelet.sock")
        self.places = Node(folder / "node")
        self._kubeconfig = kubeconfig
        self._cgroup: Path | None = None
        self.tenants: list[PodTenant] = []
        """Ended before their cgroups are removed, whoever else ends them."""

    def source(self) -> tuple[str, ...]:
        return (
            "--node", self.node, "--kubeconfig", str(self._kubeconfig), "--pod-resources",
            str(self.kubelet.path), "--logs", str(self.places.logs),
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.kubelet.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tenant in self.tenants:
            tenant.close()
        self.stop()
        self.kubelet.stop()
        if self._cgroup is not None:
            for folder in sorted(self._cgroup.rglob("*"), key=lambda path: -len(path.parts)):
                if folder.is_dir():
                    folder.rmdir()
            self._cgroup.rmdir()

    def cgroup(self, uid: str, container_id: str) -> Path:
        """A real cgroup for a container, as a kubelet with the cgroupfs driver makes it."""
        top = hierarchy()
        assert top is not None
        self._cgroup = top / f"valve-test-{os.getpid()}-{self.node}"
        folder = self._cgroup / "kubepods" / "burstable" / f"pod{uid}" / container_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class PodTenant(TenantProcess):
    """tenant.py in a container: its cgroup, its environment, no launcher."""

    def __init__(
        self, agent: NodeAgent, runtime: Path, workload: str, name: ContainerName, resources: dict[str, int]
    ) -> None:
        self.uid = str(uuid.uuid4())
        container_id = hashlib.sha256(self.uid.encode()).hexdigest()
        ids = {kind: [f"aa-{index:04}" for index in range(count)] for kind, count in resources.items()}
        agent.kubelet.pods.append((name.namespace, name.pod, name.container, ids))
        self.cgroup = folder = agent.cgroup(self.uid, container_id)
        given = child_environment({}, agent.socket, workload, runtime)
        enter = f'echo $$ > {folder}/cgroup.procs; exec "$0" "$@"'  # without libvalve, as runc is
        words = [f"{key}={value}" for key, value in given.items()]
        command = ["sh", "-c", enter, "env", *words, sys.executable, str(TENANT)]
        super().__init__(str(name), command, os.environ)
        agent.tenants.append(self)
        agent.places.link(name.namespace, name.pod, name.container, self.uid, container_id)


def status_of(kubectl: Kubectl, node: str) -> dict[str, Any]:
    return dict(kubectl.get("colocationnode", node).get("status") or {})


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((entry for entry in status.get("conditions", []) if entry["type"] == kind), {})


def wait_status(
    kubectl: Kubectl, node: str, what: str, holds: Any, timeout_s: float = 60.0
) -> dict[str, Any]:
    """Poll the object until `holds(status)`."""

    def look() -> dict[str, Any] | None:
        status = status_of(kubectl, node)
        return status if holds(status) else None

    return dict(wait_for(what, look, timeout_s))
