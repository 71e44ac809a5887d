# SPDX-License-Identifier: Apache-2.0
"""The cluster of these scenarios: a real one on this machine, or the one VALVE_KUBECONFIG names.

One for the folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "fakenv"))
import fakenv
from e2e.cluster.cluster import Cluster
from e2e.cluster.errors import MissingError
from e2e.cluster.foreign import ForeignCluster
from e2e.cluster.images import small
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.node import Node
from e2e.scenarios.kubernetes import gpu_rig, product
from e2e.scenarios.kubernetes.plugin_rig import PluginRig
from e2e.scenarios.kubernetes.shop import Shop

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
FOREIGN = os.environ.get("VALVE_KUBECONFIG", "")
running: list[Cluster | ForeignCluster] = []


@pytest.fixture(autouse=True)
def _built() -> None:
    """These scenarios name what they need one by one."""


@pytest.fixture(scope="session")
def cluster(
    with_folder: Callable[[Path], ExitStack], tmp_path_factory: pytest.TempPathFactory
) -> Cluster | ForeignCluster:
    """One node, with the small images. `own_node` for what only works on our own."""
    stack = with_folder(FOLDER)
    stack.callback(running.clear)
    try:
        if FOREIGN:
            running.append(ForeignCluster(Path(FOREIGN)))
            folder = tmp_path_factory.mktemp("images")
            for name in small.ALL:
                running[-1].load_image(small.write(name, folder))
        else:
            running.append(stack.enter_context(Cluster(logs=tmp_path_factory.mktemp("cluster-logs"))))
    except MissingError as error:
        pytest.skip(str(error))
    return running[-1]


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


@pytest.fixture(scope="module")
def plugin_rig(cluster: Cluster | ForeignCluster) -> Iterator[PluginRig]:
    if isinstance(cluster, ForeignCluster):
        pytest.skip("stops the kubelet: only on the cluster these tests start (unset VALVE_KUBECONFIG)")
    if not (ROOT / "build/runtime/lib").exists():
        pytest.skip("build/runtime is missing: run `make runtime`")
    rig = PluginRig(cluster.nodes[0], cluster.kubectl, Path(sys.executable))
    yield rig
    rig.close()


@pytest.fixture(scope="session")
def installed(cluster: Cluster | ForeignCluster) -> None:
    """Valve, by its chart, with a policy for the cluster's nodes."""
    for path in ("build/engines/bin/python", "build/model/config.json", "build/runtime/lib"):
        if not (ROOT / path).exists():
            pytest.skip(f"{path} is missing: run `make e2e`, which builds it")
    product.install(cluster)


@pytest.fixture(scope="session")
def shop(cluster: Cluster | ForeignCluster, installed: None) -> Shop:
    """An online and an offline engine in pods that share the node's device."""
    if isinstance(cluster, ForeignCluster):
        pytest.skip("reads a node's cgroups: only on the cluster these tests start (unset VALVE_KUBECONFIG)")
    return Shop(cluster.kubectl, cluster.nodes[0])


@pytest.fixture(scope="module")
def machine() -> Iterator[fakenv.Machine]:
    """A machine with the fake NVIDIA driver and two GPUs."""
    folder = fakenv.build()
    if reason := fakenv.unavailable(folder):
        pytest.skip(f"the fake NVIDIA driver cannot run here: {reason}")
    with fakenv.Machine(folder, gpus=len(gpu_rig.UUIDS), memory_mib=gpu_rig.GPU_MIB, need_nodes=True) as made:
        yield made


@pytest.fixture(scope="module")
def gpu_cluster(machine: fakenv.Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of its own, whose node has the driver, and Valve on it with the nvidia device."""
    if FOREIGN:
        pytest.skip("a node under a fake driver is one that these tests start (unset VALVE_KUBECONFIG)")
    if not (ROOT / "build/runtime/lib").exists():
        pytest.skip("build/runtime is missing: run `make runtime`")
    folder = tmp_path_factory.mktemp("gpu-cluster")
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Cluster(logs=folder / "logs", driver=gpu_rig.driver(machine)))
        except MissingError as error:
            pytest.skip(str(error))
        running.append(made)
        stack.callback(running.remove, made)
        gpu_rig.install(made, machine.folder, folder / "values.yaml")
        yield made


@pytest.fixture
def rig(plugin_rig: PluginRig) -> PluginRig:
    """The device plugin on the node, everything running and all memory lent."""
    plugin_rig.settle()
    return plugin_rig


@pytest.fixture
def namespace(kubectl: Kubectl, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own; deleted with everything in it."""
    name = request.node.name.partition("[")[0].removeprefix("test_").replace("_", "-")[:50].strip("-")
    kubectl("create", "namespace", name)
    kubectl.until("the default service account", ["sa", "default", "-n", name], lambda _: True)
    yield name
    kubectl("delete", "pods", "--all", "-n", name, "--grace-period=0", "--force", "--wait=true")
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and running:
        kept = ROOT / "build/failures" / f"{item.name}.log"
        kept.parent.mkdir(parents=True, exist_ok=True)
        restarts = product.restarts(running[-1].kubectl)
        kept.write_text(f"{restarts}\n{running[-1].log_tails(lines=500)}")
        brief = running[-1].log_tails(lines=2, width=200)
        report.sections.append((f"cluster logs; more of them in {kept.relative_to(ROOT)}", brief))
        if restarts:
            report.sections.append(("containers of Valve that were restarted", restarts))
    return report
