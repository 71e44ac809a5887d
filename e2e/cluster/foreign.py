# SPDX-License-Identifier: Apache-2.0
"""A cluster that somebody else runs: kind, or any whose kubeconfig the user names.

The scenarios that only need an API and pods run on it; those that stop a kubelet or look into a node's
folders need `Cluster` and say so. Images go in by `kind load image-archive`; where that is not possible the
user loads them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from e2e.cluster.errors import ClusterError, MissingError
from e2e.cluster.kubectl import Kubectl


class ForeignCluster:
    """Has of `Cluster` what does not need its machine: kubectl, kubeconfig, load_image, log_tails, close."""

    def __init__(self, kubeconfig: Path) -> None:
        """Raises ClusterError when it does not answer."""
        self.kubeconfig = kubeconfig
        self.kubectl = Kubectl(kubeconfig)
        self.context = self.kubectl("config", "current-context").strip()
        if not self.kubectl.items("nodes"):
            raise ClusterError(f"{kubeconfig} names a cluster without nodes: add one")

    def load_image(self, archive: Path) -> None:
        """Make a docker-archive tar known to every node. Raises MissingError where nobody can."""
        kind = shutil.which("kind")
        if kind is None or not self.context.startswith("kind-"):
            raise MissingError(
                f"{archive} cannot be loaded into {self.context}: that works with kind (put it on "
                "PATH); elsewhere push the image to a registry that the nodes pull from"
            )
        name = self.context.removeprefix("kind-")
        subprocess.run([kind, "load", "image-archive", str(archive), "--name", name], check=True)

    def log_tails(self, lines: int, width: int | None = None) -> str:
        """What can be had without the machine: the latest events."""
        events = self.kubectl("get", "events", "-A", "--sort-by=.lastTimestamp").splitlines()
        return "\n".join(event[:width] for event in events[-lines:])

    def close(self) -> None:
        """Nothing here is ours."""
