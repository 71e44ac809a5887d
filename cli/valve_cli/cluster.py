# SPDX-License-Identifier: Apache-2.0
"""The command line's way to a cluster: flags, and the few lists that its commands read.

Threading model: none. Callers: top/main.py, explain/, drain.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valve_agent.kube import credentials
from valve_agent.kube.api import Api
from valve_api.names import (
    ANNOTATION_WORKLOAD,
    API_VERSION,
    PLURAL_NODE,
    RESOURCE_OFFLINE_MEMORY,
    RESOURCE_ONLINE_GPU,
)

NODES_PATH = f"/apis/{API_VERSION}/{PLURAL_NODE}"
PAGE = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kubeconfig", type=Path, metavar="FILE", help="default: what kubectl would use")
    parser.add_argument("--context", metavar="NAME", help="context of the kubeconfig (default: its current)")


def connect(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Api:
    """Raises KubeError (credentials)."""
    path = arguments.kubeconfig or credentials.default_kubeconfig(environ)
    if path is None:
        server = credentials.in_cluster(environ)
    else:
        server = credentials.from_kubeconfig(path, arguments.context, environ)
    return Api(server, agent="kubectl-valve")


def items(api: Api, path: str, query: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """All objects of a collection, page by page. Raises KubeError."""
    found: list[dict[str, Any]] = []
    options = {**(query or {}), "limit": str(PAGE)}
    while True:
        page = api.get(path, options)
        found += page.get("items") or []
        token = page.get("metadata", {}).get("continue")
        if not token:
            return found
        options["continue"] = token


def workload_of(pod: Mapping[str, Any]) -> str | None:
    """online or offline, by what the pod was given or asks for; None: none of Valve's business."""
    for container in pod["spec"].get("containers", []):
        limits = (container.get("resources") or {}).get("limits") or {}
        if RESOURCE_ONLINE_GPU in limits:
            return "online"
        if RESOURCE_OFFLINE_MEMORY in limits:
            return "offline"
    return (pod["metadata"].get("annotations") or {}).get(ANNOTATION_WORKLOAD)


def offline_gib(pod: Mapping[str, Any]) -> int:
    """Offline memory units that the pod's containers request together."""
    total = 0
    for container in pod["spec"].get("containers", []):
        limits = (container.get("resources") or {}).get("limits") or {}
        total += int(limits.get(RESOURCE_OFFLINE_MEMORY, 0))
    return total


def name_of(pod: Mapping[str, Any]) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
