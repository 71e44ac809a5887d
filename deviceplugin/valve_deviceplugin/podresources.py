# SPDX-License-Identifier: Apache-2.0
"""Which container has which of our ids: the kubelet's pod-resources list.

Why it exists: it is the only place that says for whom an Allocate was.

Threading model: `listing` waits for the kubelet; the reconciler's thread and the allocations socket's call
it, gRPC serves both. `listing_of` is pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import grpc

from valve_deviceplugin.allocator.ledger import Owner
from valve_deviceplugin.errors import KubeletError
from valve_kubelet import calls
from valve_kubelet import podresources_pb2 as pr

TIMEOUT_S = 2.0
"""A kubelet that has just started is waited for."""


class PodResources:
    def __init__(self, socket: Path, resources: Collection[str]) -> None:
        self._socket = socket
        self._resources = resources
        self._channel = calls.channel(socket)
        self._list = calls.LIST_PODS.call(self._channel)

    def listing(self) -> dict[tuple[str, Owner], frozenset[str]]:
        """(resource, container) -> ids. Raises KubeletError."""
        try:
            answer = self._list(pr.ListPodResourcesRequest(), timeout=TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as error:
            raise KubeletError(f"no pod-resources list at {self._socket}: {reason(error)}") from error
        return listing_of(answer.pod_resources, self._resources)

    def close(self) -> None:
        self._channel.close()


def listing_of(
    pods: Iterable[pr.PodResources], resources: Collection[str]
) -> dict[tuple[str, Owner], frozenset[str]]:
    """Entries of one resource are added up: devices with a topology come one by one."""
    found: dict[tuple[str, Owner], frozenset[str]] = {}
    for pod in pods:
        for container in pod.containers:
            owner = Owner(pod.namespace, pod.name, container.name)
            for devices in container.devices:
                if devices.resource_name in resources and devices.device_ids:
                    key = (devices.resource_name, owner)
                    found[key] = found.get(key, frozenset()) | frozenset(devices.device_ids)
    return found


def reason(error: grpc.RpcError) -> str:
    """A status in one line."""
    if isinstance(error, grpc.Call):
        return f"{error.code().name.lower().replace('_', ' ')}: {error.details()}"
    return str(error)
