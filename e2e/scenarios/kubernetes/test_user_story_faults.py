# SPDX-License-Identifier: Apache-2.0
"""What breaks around a running pair of pods, under load: no online request fails and no pod restarts.

Device: cpu. After the fault offline works on and still writes the same tokens. The uninstall comes last: it
ends the installation that the others use. Gap: two operators and their failover are in
tests/integration/operator.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.cluster import Cluster
from e2e.cluster.kubectl import Refused
from e2e.scenarios.kubernetes import product, tenants
from e2e.scenarios.kubernetes import shop as shops
from e2e.scenarios.kubernetes.shop import Shop
from e2e.scenarios.kubernetes.tenants import Load

DOWN_S = 60
NEWER = "0.1.1"
BUDGET: dict[str, Any] = {
    "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
    "metadata": {"name": "online", "namespace": shops.NAMESPACE},
    "spec": {"minAvailable": 1, "selector": {"matchLabels": {"valve.io/workload": "online"}}},
}  # fmt: skip
pytestmark = pytest.mark.timeout(600)


def restart_kubelet(shop: Shop) -> None:
    shop.node.restart_kubelet()


def kill(component: str) -> Callable[[Shop], None]:
    """Delete the component's pods without grace, and wait until others are ready."""

    def fault(shop: Shop) -> None:
        chosen = ["pods", "-n", product.NAMESPACE, "-l", f"app.kubernetes.io/component={component}"]
        old = {pod["metadata"]["uid"] for pod in shop.kubectl.items(*chosen)}
        assert old, f"no pod of {component}"
        shop.kubectl("delete", *chosen, "--grace-period=0", "--force")

        def replaced(found: dict[str, list[dict[str, dict[str, str]]]]) -> bool:
            pods = found["items"]
            return bool(pods) and all(
                pod["metadata"]["uid"] not in old
                and all(
                    status["ready"] for status in pod["status"].get("containerStatuses", [{"ready": False}])
                )
                for pod in pods
            )

        shop.kubectl.until(f"another {component} is ready", chosen, replaced, 90)

    return fault


@pytest.mark.parametrize(
    ("description", "fault"),
    [
        ("the kubelet is restarted", restart_kubelet),
        ("the device plugin is killed", kill("device-plugin")),
        ("the agent is killed", kill("agent")),
        ("the operator is killed", kill("operator")),
    ],
)
def test_online_never_notices(shop: Shop, description: str, fault: Callable[[Shop], None]) -> None:
    with Load(shop.address) as load:
        load.more()
        fault(shop)
        load.more()
    assert not load.failures, description
    shop.untouched()
    shop.more_rounds()
    assert shop.output(), "every round says the same"
    amounts = ("valve.io/online-gpu", "valve.io/offline-memory-gib")
    shop.kubectl.until(
        "both resources are offered", ["node", shop.node.name],
        lambda node: all(node["status"]["allocatable"].get(name) == "1" for name in amounts),
    )  # fmt: skip
    shop.kubectl.until(
        "both tenants are reported", ["colonode", shop.node.name],
        lambda node: len(node["status"]["gpus"][0]["tenants"]) == 2,
    )  # fmt: skip


def test_online_never_notices_that_the_api_is_down(shop: Shop, cluster: Cluster) -> None:
    with Load(shop.address) as load:
        load.more()
        before = shop.batch_cpu_s()
        cluster.plane.apiserver.kill()
        time.sleep(DOWN_S)
        worked_s = shop.batch_cpu_s() - before
        cluster.plane.restart_apiserver()
        load.more()
    assert not load.failures
    assert worked_s > 0, "offline works on between the requests"
    shop.untouched()
    shop.more_rounds(timeout_s=300)
    assert shop.output(), "every round says the same"


def test_online_never_notices_a_drain(shop: Shop) -> None:
    """A disruption budget keeps the online pod until another serves; offline leaves at once, even paused."""
    shop.settle()
    shop.kubectl.apply(BUDGET)
    with Load(shop.address) as load:
        load.more()
        with pytest.raises(Refused, match="disruption budget"):
            shop.kubectl(
                "drain", shop.node.name, "--ignore-daemonsets", "--delete-emptydir-data", "--force",
                "--timeout=20s", timeout_s=180,  # it looks at its own clock between pods only
            )  # fmt: skip
        load.more()
        left = {pod["metadata"]["name"] for pod in shop.kubectl.items("pods", "-n", shops.NAMESPACE)}
        assert left == {"serve"}
        shop.kubectl("delete", "-f", "-", stdin=json.dumps(BUDGET))
        shop.kubectl("uncordon", shop.node.name)
        shop.start_batch()
        load.more()
    assert not load.failures
    shop.works()
    shop.untouched()
    assert shop.rounds()[0] == tenants.reference_tokens()


def test_online_never_notices_an_upgrade(shop: Shop, cluster: Cluster, tmp_path: Path) -> None:
    """To a new version of the library: who runs keeps the old one, who starts gets the new one."""
    newer = product.release(NEWER, tmp_path)
    old = shop.library("serve")
    with Load(shop.address) as load:
        load.more()
        product.upgrade(cluster, newer)
        load.more()
    assert not load.failures
    shop.untouched()
    shop.more_rounds()
    assert shop.output(), "every round says the same"
    shop.kubectl("delete", "pod", "batch", "-n", shops.NAMESPACE, "--wait=true")
    shop.start_batch()
    shop.works()
    assert (shop.library("serve"), shop.library("batch")) == (old, str(Path(old).with_name(NEWER)))
    assert shop.rounds()[0] == tenants.reference_tokens()


def test_online_never_notices_an_uninstall(shop: Shop, cluster: Cluster) -> None:
    with Load(shop.address) as load:
        load.more()
        product.uninstall(cluster)
        load.more(4)
    assert not load.failures
    shop.untouched()
