# SPDX-License-Identifier: Apache-2.0
"""One minute of two nodes at work, scraped by a real Prometheus: what every test here looks at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
for folder in ("tests/kubelet", "tests/integration/kube", "tools", "charts"):
    sys.path.insert(0, str(ROOT / folder))

import get_prometheus  # noqa: E402
from busy_nodes import Run, work  # noqa: E402
from node_live import NodeAgent, colocation_node, hierarchy  # noqa: E402
from prometheus_live import Prometheus  # noqa: E402

from e2e.cluster.control_plane import ControlPlane, free_ports  # noqa: E402

NODES = ("gpu-node-1", "gpu-node-2")


@pytest.fixture(scope="session")
def programs() -> Path:
    try:
        return get_prometheus.folder(get_prometheus.default_cache())
    except get_prometheus.NoPrometheus as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def run(
    control_plane: ControlPlane, programs: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory,
    with_folder: Callable[[Path], ExitStack],
) -> Run:  # fmt: skip
    """Two agents under `--node`, each with an online and two offline tenants that work for a minute."""
    if hierarchy() is None:
        pytest.skip("needs to make cgroups: root, and /sys/fs/cgroup writable")
    ports = dict(zip(NODES, free_ports(len(NODES)), strict=True))
    stack = with_folder(FOLDER)
    agents = []
    for name in NODES:
        agent = NodeAgent(
            tmp_path_factory.mktemp(name), name, control_plane.kubeconfig, "--metrics-port", str(ports[name]),
        )  # fmt: skip
        stack.enter_context(agent)
        memory = {"slabSize": "2Mi", "reservation": {"min": "2Mi", "max": "24Mi", "quietPeriod": "4s"}}
        control_plane.kubectl.apply(colocation_node(name, memory=memory))
        stack.callback(control_plane.kubectl, "delete", "colocationnode", name)
        agent.start()
        agents.append(agent)
    prometheus = stack.enter_context(Prometheus(programs, tmp_path_factory.mktemp("prom"), ports))
    start, end = work(stack, agents, runtime)
    return Run(prometheus, ports, start, end)
