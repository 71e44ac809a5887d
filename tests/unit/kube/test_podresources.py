# SPDX-License-Identifier: Apache-2.0
"""What the kubelet allocated, over real gRPC on a unix socket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubelet_stand_in import FakeKubelet

from valve_agent.kube.allocation import Allocation, allocations_of
from valve_agent.wire import Role
from valve_api.container import ContainerName
from valve_api.names import RESOURCES
from valve_kubelet.podresources import NoListError, PodResources

GIB = 1 << 30
OFFLINE, ONLINE = "valve.io/offline-memory-gib", "valve.io/online-gpu"


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[FakeKubelet]:
    with FakeKubelet(tmp_path / "kubelet.sock") as fake:
        yield fake


def client_of(kubelet: FakeKubelet) -> PodResources:
    return PodResources(kubelet.path, RESOURCES, timeout_s=5.0, patient=False)


def test_allocations_of_both_kinds(kubelet: FakeKubelet) -> None:
    kubelet.pods = [
        ("batch", "job-1", "main", {OFFLINE: ["aa-0003", "aa-0001"], "nvidia.com/gpu": ["GPU-1"]}),
        ("serve", "vllm-0", "engine", {ONLINE: ["aa-seat"]}),
        ("serve", "plain", "web", {"cpu.example/isolated": ["1"]}),
    ]
    client = client_of(kubelet)
    found = allocations_of(client.listing())
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
    client = client_of(kubelet)
    (allocation,) = allocations_of(client.listing()).values()
    client.close()
    assert allocation.offline_units == 90_000


def test_a_kubelet_that_restarts(kubelet: FakeKubelet) -> None:
    client = client_of(kubelet)
    kubelet.pods = [("b", "p", "c", {OFFLINE: ["aa-1"]})]
    assert len(client.listing()) == 1
    kubelet.stop()
    with pytest.raises(NoListError, match=r"does not answer at .*kubelet.sock.*mount"):
        client.listing()
    kubelet.start()
    deadline = time.monotonic() + 30
    while True:
        try:
            assert len(client.listing()) == 1
            break
        except NoListError:
            assert time.monotonic() < deadline, "the client did not find the kubelet again"
            time.sleep(0.1)
    client.close()
