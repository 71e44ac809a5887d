# SPDX-License-Identifier: Apache-2.0
"""The user's story: install the chart, apply a policy, annotate two pods, and they share the device.

Device: cpu. Engines: vLLM serves online, transformers works offline. Aspects: both pods become tenants by
their annotations alone; offline computes nothing while a request is in the online engine and goes on
afterwards; memory is taken from offline while it runs; what it writes is token for token what it writes
without Valve; `kubectl get` tells all that.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from e2e.cluster.kubectl import is_ready
from e2e.scenarios.kubernetes import shop as shops
from e2e.scenarios.kubernetes import tenants
from e2e.scenarios.kubernetes.shop import Shop

LONG, LAST = 160, 24
REQUESTS = 3
TAKES = 3
SLABS = 33
"""Of the device's 36: what offline uses, a few slabs, is among them."""
QUIET = 0.05
"""Most of a core that offline may use while online is busy: what stopping and continuing it costs."""
pytestmark = pytest.mark.timeout(600)


def test_annotations_become_resources_and_the_runtime(shop: Shop) -> None:
    limits = shop.pods["batch"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"valve.io/offline-memory-gib": "1"}
    assert shop.pods["serve"]["spec"]["containers"][0]["resources"]["limits"] == {"valve.io/online-gpu": "1"}
    assert shop.lines()[0] == {"tenant": True}


def test_offline_yields_to_every_request(shop: Shop) -> None:
    busy_cpu, busy_s, calm_cpu, calm_s = 0.0, 0.0, 0.0, 0.0
    for _ in range(REQUESTS):
        stream = tenants.complete(shop.address, LONG)
        first = next(stream)
        before = shop.batch_cpu_s()
        tokens = [next(stream) for _ in range(LONG - LAST)]
        busy_cpu += shop.batch_cpu_s() - before
        busy_s += tokens[-1].at_s - first.at_s
        assert sum(1 for _ in stream) == LAST - 1, "the request was answered to its end"
        time.sleep(0.3)
        before, started = shop.batch_cpu_s(), time.monotonic()
        time.sleep(2)
        calm_cpu += shop.batch_cpu_s() - before
        calm_s += time.monotonic() - started
    busy_cores, calm_cores = busy_cpu / busy_s, calm_cpu / calm_s
    print(f"offline: {busy_cores:.3f} cores while online is busy, {calm_cores:.2f} afterwards (device: cpu)")
    assert busy_cores < QUIET
    assert calm_cores > QUIET * 4


def test_memory_is_taken_and_the_output_is_the_same(shop: Shop) -> None:
    shop.more_rounds()
    for _ in range(TAKES):
        assert shop.take(SLABS) == SLABS
        time.sleep(1)  # in the middle of a round of some seconds
    shop.more_rounds()
    assert shop.output() == tenants.reference_tokens()

    def reclaimed(node: dict[str, Any]) -> bool:
        gpu = node["status"]["gpus"][0]
        return bool(gpu["preemptions"] >= REQUESTS and gpu["reclaims"] >= 1)

    shop.kubectl.until("the node reports it", ["colonode", shop.node.name], reclaimed)


def test_kubectl_tells_it(shop: Shop) -> None:
    shop.kubectl.until("the policy is Ready", ["colo", "e2e"], is_ready)
    workloads = {tenant["name"]: tenant["workload"] for tenant in shop.gpu()["tenants"]}
    assert workloads == {f"{shops.NAMESPACE}/serve": "online", f"{shops.NAMESPACE}/batch": "offline"}
    policy, node = shop.kubectl("get", "colo").splitlines(), shop.kubectl("get", "colonode").splitlines()
    print("", *policy, *node, sep="\n")
    assert policy[1].split()[0] == "e2e"
    assert node[1].split()[0] == shop.node.name
