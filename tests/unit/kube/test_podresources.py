# SPDX-License-Identifier: Apache-2.0
"""What the kubelet allocated, over real gRPC on a unix socket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubelet_stand_in import FakeKubelet

from valve_agent.kube.podresources import Allocation, ContainerName, PodResources, PodResourcesError
from valve_agent.wire import Role

GIB = 1 << 30
OFFLINE, ONLINE = "valve.io/offline-memory-gib", "valve.io/online-gpu"


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[FakeKubelet]:
    with FakeKubelet(tmp_path / "kubelet.sock") as fake:
        yield fake


def test_allocations_of_both_kinds(kubelet: FakeKubelet) -> None:
    kubelet.pods = [
        ("batch", "job-1", "main", {OFFLINE: ["aa-0003", "aa-0001"], "nvidia.com/gpu": ["GPU-1"]}),
        ("serve", "vllm-0", "engine", {ONLINE: ["aa-seat"]}),
        ("serve", "plain", "web", {"cpu.example/isolated": ["1"]}),
    ]
    client = PodResources(kubelet.path)
    found = client.list_allocations()
    client.close()
    batch = Allocation(0, 2, ("aa-0001", "aa-0003"))
    assert found == {
        ContainerName("batch", "job-1", "main"): batch,
        ContainerName("serve", "vllm-0", "engine"): Allocation(1, 0, ("aa-seat",)),
    }
    assert (batch.role, batch.offline_bytes) == (Role.OFFLINE, 2 * GIB)


def test_a_container_with_both_kinds_has_no_role() -> None:
    assert Allocation(1, 4).role is None


def test_more_than_grpc_takes_by_default(kubelet: FakeKubelet) -> None:
    kubelet.pods = [("b", "p", "c", {OFFLINE: [f"{i:040}-{i:05}" for i in range(90_000)]})]
    client = PodResources(kubelet.path)
    (allocation,) = client.list_allocations().values()
    client.close()
    assert allocation.offline_units == 90_000


def test_a_kubelet_that_restarts(kubelet: FakeKubelet) -> None:
    client = PodResources(kubelet.path, timeout_s=2.0)
    kubelet.pods = [("b", "p", "c", {OFFLINE: ["aa-1"]})]
    assert len(client.list_allocations()) == 1
    kubelet.stop()
    with pytest.raises(PodResourcesError, match=r"does not answer at .*kubelet.sock.*mount"):
        client.list_allocations()
    kubelet.start()
    deadline = time.monotonic() + 30
    while True:
        try:
            assert len(client.list_allocations()) == 1
            break
        except PodResourcesError:
            assert time.monotonic() < deadline, "the client did not find the kubelet again"
            time.sleep(0.1)
    client.close()
