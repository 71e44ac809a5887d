# SPDX-License-Identifier: Apache-2.0
"""`valve status`: what the agent knows now, for people or as JSON.

Threading model: none. Called by valve_cli.main. It asks at the agent's status socket, which only root and
the agent's user may open.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from valve_agent import sockets
from valve_api.node_socket import read_json

TIMEOUT_S = 5.0


class StatusError(Exception):
    """No status can be had; the message says why."""


def read_status(path: Path, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The snapshot of the agent that listens at `path` (valve_agent.status). Raises StatusError."""
    address = path.with_name(path.name + sockets.STATUS_SUFFIX)
    try:
        document = read_json(address, timeout_s)
    except PermissionError as error:
        raise StatusError(f"only root and the agent's user may read {address}") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise StatusError(
            f"no agent listens at {path}: start one with `valve agent`, or give --socket"
        ) from error
    except (OSError, ValueError) as error:
        raise StatusError(f"the agent at {path} gave no whole answer ({error}): try again") from error
    assert isinstance(document, dict)
    return document


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="valve status", description="What the agent knows now.")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the agent's socket")
    parser.add_argument("--json", action="store_true", help="the whole snapshot as JSON")
    arguments, _ = parser.parse_known_args(argv)
    try:
        status = read_status(arguments.socket or sockets.default_path(os.environ, os.getuid()))
    except StatusError as error:
        print(f"valve status: {error}", file=sys.stderr)
        return 1
    print(json.dumps(status, indent=2) if arguments.json else as_text(status))
    return 0


def as_text(status: dict[str, Any]) -> str:
    parts = [_device(gpu) for gpu in status["gpus"]]
    parts += [f"{gpu} is not shared: {why}" for gpu, why in status["unusable"].items()]
    return "\n".join(parts)


def _device(status: dict[str, Any]) -> str:
    slabs, reclaims, preempt = status["slabs"], status["reclaims"], status["preempt_us"]
    each = slabs["bytes_each"] >> 20
    lines = [
        f"policy {status['policy']} on device {status['id']}, up {status['uptime_s']:.0f} s; "
        f"offline is {'paused' if status['offline_paused'] else 'running'}",
        f"slabs of {each}Mi: {slabs['total']} in all, {slabs['free']} free, "
        f"{slabs['reservation']} reserved for online"
        f"{'' if status['huge_pages'] else ' (4 KiB pages: reclaim is slow)'}",
        f"reclaims: {reclaims['total']} ({reclaims['bytes'] >> 20}Mi, "
        f"{reclaims['bytes_in_use'] >> 20}Mi of it in use)",
        f"preemptions: {status['gate']['pauses']}"
        + (f", p50 {preempt['p50']:.0f} us, p99 {preempt['p99']:.0f} us" if preempt["samples"] else ""),
    ]
    route = status.get("route")
    if route:
        lines.insert(1, f"route {route['route']}: {route['why']} (driver {route['driver']})")
    for name, tenant in sorted(status["tenants"].items()):
        lines.append(
            f"  {tenant['role']:8} {name}: holds {tenant['held_slabs']} of at most "
            f"{tenant['limit_slabs']} slabs, "
            f"{len(tenant['processes'])} processes, {tenant['tokens']} tokens"
        )
        for process in tenant["processes"]:
            taken = process.get("route")
            if taken and taken["route"] != (route or {}).get("route"):
                lines.append(f"    process {process['pid']} by route {taken['route']}: {taken['why']}")
    return "\n".join(lines)
