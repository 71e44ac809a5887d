# SPDX-License-Identifier: Apache-2.0
"""An agent on a node of a real control plane, per test; the kubelet stand-in is shared with the unit lane."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests" / "kubelet"))

from node_live import NodeAgent, PodTenant, colocation_node, hierarchy  # noqa: E402

from e2e.cluster.control_plane import ControlPlane  # noqa: E402
from valve_api.container import ContainerName  # noqa: E402

OFFLINE, ONLINE = "valve.io/offline-memory-gib", "valve.io/online-gpu"


@pytest.fixture
def node(tmp_path: Path, control_plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[NodeAgent]:
    """An agent that is not started, with a kubelet stand-in that is. Its ColocationNode is removed after."""
    name = request.node.name.replace("_", "-").removeprefix("test-")[:40].strip("-")
    with NodeAgent(tmp_path, name, control_plane.kubeconfig) as agent:
        yield agent
    control_plane.kubectl("delete", "colocationnode", name, "--ignore-not-found")


@pytest.fixture
def running(node: NodeAgent, control_plane: ControlPlane) -> NodeAgent:
    """Settings are there, the agent listens."""
    control_plane.kubectl.apply(colocation_node(node.node))
    node.start()
    return node


@pytest.fixture
def pod(runtime: Path) -> Iterator[Callable[..., PodTenant]]:
    """pod(agent, "offline", "batch", "job"): a tenant in a real cgroup of its own."""
    if hierarchy() is None:
        pytest.skip("needs to make cgroups: root, and /sys/fs/cgroup writable")
    with contextlib.ExitStack() as stack:

        def begin(agent: NodeAgent, workload: str, namespace: str, name: str, gib: int = 1) -> PodTenant:
            resources = {ONLINE: 1} if workload == "online" else {OFFLINE: gib}
            container = ContainerName(namespace, name, "main")
            return stack.enter_context(PodTenant(agent, runtime, workload, container, resources))

        yield begin
