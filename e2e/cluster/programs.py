# SPDX-License-Identifier: Apache-2.0
"""Where the cluster's programs are: those built by e2e.cluster.build, and those the system must have."""

from __future__ import annotations

import shutil
from pathlib import Path

from e2e.cluster.build import LINK
from e2e.cluster.errors import MissingError

SYSTEM = {
    "runc": "runc",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "busybox": "busybox-static",
    "debootstrap": "debootstrap",
    "promtool": "prometheus",
    "prometheus": "prometheus",
}
"""Command -> Debian package; tools/cluster-deps.sh installs them."""
CNI_PLUGINS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))


def program(name: str, group: str | None = None) -> Path:
    """A program that `make cluster` builds. Raises MissingError when it is not built."""
    path = LINK / (group or name) / name
    if not path.exists():
        raise MissingError(f"{path} is not built: run `make cluster` (about eight minutes the first time)")
    return path


def kube(command: str) -> list[str]:
    """The start of a command line for one of the programs in the Kubernetes binary."""
    return [str(program("kube")), command]


def system_program(name: str) -> Path:
    """A program of the system. Raises MissingError naming its Debian package."""
    path = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise MissingError(f"{name} is missing: run tools/cluster-deps.sh (Debian package {SYSTEM[name]})")
    return Path(path)


def cni_plugins() -> Path:
    """The folder with the `bridge` and `host-local` CNI plugins."""
    for folder in CNI_PLUGINS:
        if (folder / "bridge").exists():
            return folder
    raise MissingError(
        "the CNI plugins are missing: run tools/cluster-deps.sh (Debian package containernetworking-plugins)"
    )
