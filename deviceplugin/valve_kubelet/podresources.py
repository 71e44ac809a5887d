# SPDX-License-Identifier: Apache-2.0
"""Which container has which ids of Valve's resources: the kubelet's pod-resources list, v1, on a unix socket.

Why it exists: it is the only place that says for whom an Allocate was, and what a pod may use is what the
scheduler and the kubelet accounted for, not what its processes claim. It needs no API server.

Threading model: `listing` waits for the kubelet, from any thread; gRPC serves them all. `listing_of` is pure.
Callers: the device plugin's reconciler and allocations socket, the agent's kube/containers.py.

    NoListError    the kubelet gave no answer; what was known stays in force
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import grpc

from valve_api.container import ContainerName, Listing
from valve_kubelet import calls
from valve_kubelet import podresources_pb2 as pr


class NoListError(Exception):
    """Says where nobody answered and what to mount."""


class PodResources:
    """A client of one kubelet. It connects when it is asked, and again after a kubelet restart."""

    def __init__(self, socket: Path, resources: Collection[str], timeout_s: float, patient: bool) -> None:
        """resources: those that count. timeout_s: most that an answer is waited for.
        patient: a kubelet that is not there yet is waited for as well."""
        self._socket = socket
        self._resources = resources
        self._timeout_s, self._patient = timeout_s, patient
        self._channel = calls.channel(socket)
        self._list = calls.LIST_PODS.call(self._channel)

    def listing(self) -> Listing:
        """Every container of this node that has some. Raises NoListError."""
        request = pr.ListPodResourcesRequest()
        try:
            answer = self._list(request, timeout=self._timeout_s, wait_for_ready=self._patient)
        except grpc.RpcError as error:
            raise NoListError(
                f"the kubelet does not answer at {self._socket} ({reason(error)}): mount the kubelet's "
                "pod-resources folder into this container"
            ) from error
        return listing_of(answer.pod_resources, self._resources)

    def close(self) -> None:
        self._channel.close()


def listing_of(pods: Iterable[pr.PodResources], resources: Collection[str]) -> Listing:
    """Entries of one resource are added up: devices with a topology come one by one."""
    found: dict[tuple[str, ContainerName], set[str]] = {}
    for pod in pods:
        for container in pod.containers:
            owner = ContainerName(pod.namespace, pod.name, container.name)
            for devices in container.devices:
                if devices.resource_name in resources and devices.device_ids:
                    found.setdefault((devices.resource_name, owner), set()).update(devices.device_ids)
    return {key: frozenset(ids) for key, ids in found.items()}


def reason(error: grpc.RpcError) -> str:
    """A status in one line."""
    if isinstance(error, grpc.Call):
        return f"{error.code().name.lower().replace('_', ' ')}: {error.details()}"
    return str(error)
