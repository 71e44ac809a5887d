# SPDX-License-Identifier: Apache-2.0
"""What the node agent says of its GPUs, read from its status socket.

Why it exists: only the agent knows how much of a GPU it lends. The socket has mode 0600 and belongs to
root; the plugin runs as uid 0 without capabilities, which is enough to open it and to do nothing else.

Threading model: `read_status` waits up to its timeout; only the watcher thread calls it. `reports_of` is
pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valve_api.node_socket import read_json
from valve_deviceplugin.allocator.lending import Report
from valve_deviceplugin.errors import AgentError

SUFFIX = ".status"
"""The status socket stands beside the agent's (docs/architecture.md)."""
SCHEMA = "valve.io/status/v1"


def read_status(agent_socket: Path, timeout_s: float) -> dict[str, Any]:
    """One snapshot. Raises AgentError."""
    address = agent_socket.with_name(agent_socket.name + SUFFIX)
    try:
        document = read_json(address, timeout_s)
    except PermissionError as error:
        raise AgentError(
            f"{address} may not be opened: run the device plugin as uid 0 (no capability is needed)"
        ) from error
    except (OSError, ValueError) as error:
        raise AgentError(f"no status at {address}: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise AgentError(
            f"{address} does not speak {SCHEMA}: upgrade the agent and the device plugin together"
        )
    return document


def reports_of(status: Mapping[str, Any]) -> list[Report]:
    """The GPUs in a status. Raises AgentError."""
    try:
        return [_report(gpu) for gpu in status["gpus"]]
    except (KeyError, TypeError, ValueError) as error:
        raise AgentError(f"the agent's status is not whole: {error!r}") from error


def _report(gpu: Mapping[str, Any]) -> Report:
    numa_node = gpu.get("numa_node")
    return Report(
        str(gpu["id"]), int(gpu["memory_bytes"]), int(gpu["lendable_bytes"]), int(gpu["online_tenants"]),
        None if numa_node is None else int(numa_node),
    )  # fmt: skip
