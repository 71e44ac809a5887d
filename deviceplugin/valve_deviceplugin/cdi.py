# SPDX-License-Identifier: Apache-2.0
"""The CDI specs of the runtime: one file per version, kept while a container may be started with it again.

Why it exists: the kubelet keeps the answer of an Allocate for the life of the pod and starts its containers
again with it. A spec that is gone then is a pod that never comes back, so the specs of every version in the
ledger are written at each start: their folder is usually a tmpfs, empty after a reboot.

Threading model: called by main before serving, and by plugin.py under no lock: writing the same file twice is
harmless. Reference: the Container Device Interface specification, 0.6.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from valve_api.names import Workload
from valve_deviceplugin.injection import CDI_KIND, Runtime
from valve_deviceplugin.store import write_atomically

CDI_VERSION = "0.6.0"
PREFIX = "valve.io-runtime-"
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*[A-Za-z0-9]")


def spec(runtime: Runtime) -> dict[str, Any]:
    """The spec of one version: a device for each workload."""
    mounts = [
        {
            "hostPath": mount.host,
            "containerPath": mount.container,
            "options": ["ro", "nosuid", "nodev", "rbind"],
        }
        for mount in runtime.mounts()
    ]
    return {
        "cdiVersion": CDI_VERSION,
        "kind": CDI_KIND,
        "devices": [
            {
                "name": runtime.cdi_device(workload),
                "containerEdits": {
                    "env": [f"{name}={value}" for name, value in runtime.env(workload).items()],
                    "mounts": mounts,
                },
            }
            for workload in Workload
        ],
    }


def usable(runtime: Runtime) -> bool:
    """Whether the version makes a valid device name."""
    return all(_DEVICE.fullmatch(runtime.cdi_device(workload)) for workload in Workload)


def path_of(folder: Path, runtime: Runtime) -> Path:
    return folder / f"{PREFIX}{runtime.version}.json"


def ensure(folder: Path, runtime: Runtime) -> None:
    """Write a version's spec unless it is there as it should be. Raises OSError."""
    path = path_of(folder, runtime)
    data = json.dumps(spec(runtime), indent=2).encode()
    try:
        if path.read_bytes() == data:
            return
    except FileNotFoundError:
        pass
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_atomically(path, data, 0o644)


def keep_only(folder: Path, libraries: Iterable[str]) -> list[str]:
    """Remove the specs of versions that no container uses; the names of the files removed. Raises OSError."""
    wanted = {f"{PREFIX}{PurePosixPath(library).name}.json" for library in libraries}
    removed = []
    for path in sorted(folder.glob(f"{PREFIX}*.json")):
        if path.name not in wanted:
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed
