# SPDX-License-Identifier: Apache-2.0
"""Which container is on which GPU: the device plugin's ledger, asked at its socket.

Why it exists: the kubelet knows ids, which are tokens; on a node of several GPUs only the ledger says which
GPU they stand for. The plugin looks at the kubelet's list before it answers, so a container that has just
started is in it. The document, `valve.io/allocations/v1`, is described in docs/architecture.md.

Threading model: `read` waits up to TIMEOUT_S; only the thread of kube/containers.py calls it.

    LedgerError    no ledger can be had; the message says why
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valve_api.container import ContainerName
from valve_api.node_socket import read_json

SOCKET = "allocations.sock"
SCHEMA = "valve.io/allocations/v1"
TIMEOUT_S = 5.0


class LedgerError(Exception):
    pass


class Ledger:
    def __init__(self, folder: Path) -> None:
        """`folder`: the device plugin's --state-dir."""
        self._socket = folder / SOCKET

    def read(self) -> dict[ContainerName, tuple[str, ...]]:
        """Container -> UUIDs of its GPUs, in the order in which it sees them. Raises LedgerError."""
        try:
            document = read_json(self._socket, TIMEOUT_S)
        except (OSError, ValueError) as error:
            raise LedgerError(
                f"the device plugin does not say which pod is on which GPU ({self._socket}: {error}): is it "
                "running, and is --allocations its --state-dir?"
            ) from error
        return gpus_of(document)


def gpus_of(document: Any) -> dict[ContainerName, tuple[str, ...]]:
    """Raises LedgerError for a document of another form."""
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        raise LedgerError(f"the device plugin does not speak {SCHEMA}: upgrade it and the agent together")
    found: dict[ContainerName, tuple[str, ...]] = {}
    try:
        for entry in document["allocations"]:
            owner = entry["owner"]
            if owner is not None:
                name = ContainerName(owner["namespace"], owner["pod"], owner["container"])
                gpus = [*found.get(name, ()), *(str(gpu) for gpu in entry["gpus"])]
                found[name] = tuple(dict.fromkeys(gpus))
    except (KeyError, TypeError) as error:
        raise LedgerError(f"the device plugin's ledger is not whole: {error!r}") from error
    return found
