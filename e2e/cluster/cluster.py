# SPDX-License-Identifier: Apache-2.0
"""A whole Kubernetes on this machine: control plane, nodes, containers; no registry, no internet.

    with Cluster(logs=tmp_path) as cluster:
        cluster.load_image(tar)
        cluster.kubectl.apply(Path("pod.yaml"))

Needs root (namespaces, mounts, cgroups). Ready in about eight seconds; a pod runs one second later. Nothing
of it outlives the test, even if that is killed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from e2e.cluster import network
from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.images import small
from e2e.cluster.node import FakeDriver, Node
from e2e.cluster.processes import Supervisor, tail

STATE_FOLDER = Path("/var/tmp")
"""On a disk: containers' file systems are overlays in it."""


class Cluster:
    """`kubectl` and `kubeconfig` are the administrator's; `nodes` can be looked into and broken."""

    def __init__(
        self,
        *,
        nodes: int = 1,
        labels: Mapping[str, str] | None = None,
        logs: Path | None = None,
        images: Sequence[str] = tuple(small.ALL),
        driver: FakeDriver | None = None,
    ) -> None:
        """Returns when every node is Ready. Raises MissingError, StartError.

        labels  of every node
        logs    a folder that outlives the cluster; default: lost with it
        images  which of the small images to load
        driver  what every node has besides this machine's devices
        """
        self.state = Path(tempfile.mkdtemp(prefix="valve-cluster-", dir=STATE_FOLDER))
        self.logs = logs or self.state / "logs"
        self.nodes: list[Node] = []
        self._labels = dict(labels or {})
        self._driver = driver
        self._hub: Supervisor | None = None
        try:
            self._hub = Supervisor(self.logs / "control-plane", isolate=True, remove=self.state)
            self.network = network.create(self._hub.pid)
            self._hub.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
            self.plane = ControlPlane(
                self.state / "plane", controllers=True, supervisor=self._hub, address=self.network.hub_address
            )
            self.kubeconfig, self.kubectl = self.plane.kubeconfig, self.plane.kubectl
            for _ in range(nodes):
                self._start_node()
            archives = [self._small(name) for name in images]
            for node in self.nodes:
                self._await(node, archives)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _small(self, name: str) -> Path:
        folder = self.state / "images"
        folder.mkdir(exist_ok=True)
        return small.write(name, folder)

    def _start_node(self) -> Node:
        index = len(self.nodes) + 1
        name = f"node-{index}"
        node = Node(
            self.plane, self.network, self.state / name, self.logs / name, index, self._labels, self._driver
        )
        self.nodes.append(node)
        return node

    def _await(self, node: Node, archives: Sequence[Path]) -> None:
        for path in archives:
            node.load_image(path)
        self.kubectl.until(f"{node.name} Ready", ["node", node.name], node.ready, timeout_s=60)

    def load_image(self, archive: Path) -> None:
        """Make a docker-archive tar known to every node."""
        for node in self.nodes:
            node.load_image(archive)

    def log_tails(self, lines: int, width: int | None = None) -> str:
        """The ends of every log, for a failed test's report."""
        files = sorted(self.logs.rglob("*.log"))
        return "\n".join(f"--- {file.relative_to(self.logs)}\n{tail(file, lines, width)}" for file in files)

    def close(self) -> None:
        """End everything; nodes first, for the hub's janitor removes their folders."""
        for node in self.nodes:
            node.close()
        if self._hub:
            self._hub.close()
        elif self.state.exists():
            shutil.rmtree(self.state)
