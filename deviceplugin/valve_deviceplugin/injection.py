# SPDX-License-Identifier: Apache-2.0
"""What a container is given so that the runtime is in it.

Why it exists: the same few things by two ways. As `mounts`, they are part of the Allocate response and work
with every runtime; the pod's own env of the same name wins over the response's. By `cdi`, they stand in a
spec file on the node and the container runtime merges them last, so a pod cannot switch the runtime off.

PYTHONPATH is not set: it would replace the image's own. libvalve puts VALVE_PYTHONPATH in front of it.

Threading model: pure values. Callers: plugin.py, cdi.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from valve_api.names import Workload

PRELOAD = "/etc/ld.so.preload"
CDI_KIND = "valve.io/runtime"
NVIDIA_KIND = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True)
class Mount:
    host: str
    container: str


@dataclass(frozen=True, slots=True)
class Runtime:
    """One version of the runtime on the node, and the agent that it talks to."""

    library: PurePosixPath
    """folder on the host, and at the same place in the container"""
    agent_socket: PurePosixPath

    @property
    def version(self) -> str:
        return self.library.name

    def mounts(self) -> list[Mount]:
        folder, sockets = str(self.library), str(self.agent_socket.parent)
        return [
            Mount(folder, folder),
            Mount(str(self.library / "ld.so.preload"), PRELOAD),
            Mount(sockets, sockets),
        ]

    def env(self, workload: Workload) -> dict[str, str]:
        return {
            "VALVE_SOCKET": str(self.agent_socket),
            "VALVE_WORKLOAD": workload.value,
            "VALVE_PYTHONPATH": str(self.library / "python"),
        }

    def cdi_device(self, workload: Workload) -> str:
        return f"{self.version}-{workload.value}"


@dataclass(frozen=True, slots=True)
class Injection:
    env: dict[str, str]
    mounts: list[Mount] = field(default_factory=list)
    cdi: list[str] = field(default_factory=list)
    """qualified CDI device names"""


def injection(
    runtime: Runtime,
    workload: Workload,
    gpus: Sequence[str],
    memory_gib: int,
    *,
    by_cdi: bool,
    gpu_access: str,
) -> Injection:
    """gpu_access: how the container gets the GPU's device files: `none`, `env` (NVIDIA_VISIBLE_DEVICES,
    read by NVIDIA's runtime) or `cdi` (the spec that nvidia-ctk writes)."""
    env = {"VALVE_GPU": ",".join(gpus)}
    cdi: list[str] = []
    if workload is Workload.OFFLINE:
        env["VALVE_MEMORY_GIB"] = str(memory_gib)
    if gpu_access == "env":
        env["NVIDIA_VISIBLE_DEVICES"] = ",".join(gpus)
    elif gpu_access == "cdi":
        cdi += [f"{NVIDIA_KIND}={gpu}" for gpu in gpus]
    if by_cdi:
        return Injection(env, [], [f"{CDI_KIND}={runtime.cdi_device(workload)}", *cdi])
    return Injection({**runtime.env(workload), **env}, runtime.mounts(), cdi)
