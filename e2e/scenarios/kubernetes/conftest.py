# SPDX-License-Identifier: Apache-2.0
"""The cluster of these scenarios: a real one on this machine, or the one VALVE_KUBECONFIG names.

One for the folder. It ends with the folder's last test, not with the session: an idle control plane would
disturb the scenarios that measure.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from e2e.cluster.cluster import Cluster
from e2e.cluster.errors import MissingError
from e2e.cluster.foreign import ForeignCluster
from e2e.cluster.images import small
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.node import Node

FOLDER = Path(__file__).parent
FOREIGN = os.environ.get("VALVE_KUBECONFIG", "")
running: list[Cluster | ForeignCluster] = []


@pytest.fixture(autouse=True)
def _built() -> None:
    """These scenarios name what they need one by one."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster | ForeignCluster]:
    """One node, with the small images. `own_node` for what only works on our own."""
    try:
        if FOREIGN:
            running.append(ForeignCluster(Path(FOREIGN)))
            folder = tmp_path_factory.mktemp("images")
            for name in small.ALL:
                running[0].load_image(small.write(name, folder))
        else:
            running.append(Cluster(logs=tmp_path_factory.mktemp("cluster-logs")))
    except MissingError as error:
        pytest.skip(str(error))
    yield running[0]
    stop()


@pytest.fixture
def kubectl(cluster: Cluster | ForeignCluster) -> Kubectl:
    return cluster.kubectl


@pytest.fixture
def own_node(cluster: Cluster | ForeignCluster) -> Node:
    """The node as something to look into and to break."""
    if isinstance(cluster, ForeignCluster):
        pytest.skip(
            "breaks or looks into a node: only on the cluster these tests start (unset VALVE_KUBECONFIG)"
        )
    return cluster.nodes[0]


@pytest.fixture
def namespace(kubectl: Kubectl, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own; deleted with everything in it."""
    name = request.node.name.partition("[")[0].removeprefix("test_").replace("_", "-")[:50].strip("-")
    kubectl("create", "namespace", name)
    kubectl.until("the default service account", ["sa", "default", "-n", name], lambda _: True)
    yield name
    kubectl("delete", "pods", "--all", "-n", name, "--grace-period=0", "--force", "--wait=true")
    kubectl("delete", "namespace", name, "--wait=false")


def stop() -> None:
    while running:
        running.pop().close()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None] | None:
    if nextitem is None or not nextitem.path.is_relative_to(FOLDER):
        stop()
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and running:
        report.sections.append(("cluster logs", running[0].log_tails()))
    return report
