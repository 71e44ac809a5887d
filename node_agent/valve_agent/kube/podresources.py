# SPDX-License-Identifier: Apache-2.0
"""What the kubelet has given to which container: its pod-resources API, v1, over a unix socket.

Why it exists: a pod's role and memory limit are what the scheduler and the kubelet accounted for, not what
its processes claim. The API needs no API server, so the agent knows its pods while that is away.

The messages are declared here, with the field numbers of k8s.io/kubelet/pkg/apis/podresources/v1 and only
the fields that we read: protobuf skips the others, and nothing has to be generated.

Threading model: `list_allocations` waits for the kubelet, so only the thread of kube/containers.py calls it.

    PodResourcesError    the kubelet gave no answer; what was known stays in force
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from valve_agent.wire import Role
from valve_api.names import OFFLINE_MEMORY_UNIT_BYTES, RESOURCE_OFFLINE_MEMORY, RESOURCE_ONLINE_GPU

SOCKET = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
LIST = "/v1.PodResourcesLister/List"
TIMEOUT_S = 5.0
MESSAGE_BYTES_MAX = 16 << 20
"""56,000 device ids are 3 MB; gRPC's own limit is 4 MiB."""

_PACKAGE = "valve.podresources"
_STRING = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
_MESSAGE = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
_ONE = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
_MANY = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
_MESSAGES: dict[str, tuple[tuple[int, str, Any, str], ...]] = {
    "ListRequest": (),
    "ListResponse": ((1, "pod_resources", _MANY, "Pod"),),
    "Pod": ((1, "name", _ONE, ""), (2, "namespace", _ONE, ""), (3, "containers", _MANY, "Container")),
    "Container": ((1, "name", _ONE, ""), (2, "devices", _MANY, "Devices")),
    "Devices": ((1, "resource_name", _ONE, ""), (2, "device_ids", _MANY, "")),
}


class PodResourcesError(Exception):
    pass


@dataclass(frozen=True, slots=True, order=True)
class ContainerName:
    """A container as Kubernetes names it."""

    namespace: str
    pod: str
    container: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}/{self.container}"


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one container got of Valve's resources."""

    online_seats: int = 0
    offline_units: int = 0
    device_ids: tuple[str, ...] = ()
    """As the device plugin named them; its ledger says which GPU they are on."""

    @property
    def role(self) -> Role | None:
        """None if it has both kinds: admission does not let that happen, and we do not guess."""
        if self.online_seats and self.offline_units:
            return None
        return Role.ONLINE if self.online_seats else Role.OFFLINE

    @property
    def offline_bytes(self) -> int:
        return self.offline_units * OFFLINE_MEMORY_UNIT_BYTES


def messages() -> dict[str, Any]:
    """The message classes by name; tests serve the API with the same."""
    file = descriptor_pb2.FileDescriptorProto(
        name="valve/podresources.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, field, label, kind in fields:
            message.field.add(
                name=field, number=number, label=label, type=_MESSAGE if kind else _STRING,
                type_name=f".{_PACKAGE}.{kind}" if kind else None,
            )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


class PodResources:
    """A client of one kubelet. It reconnects by itself after a kubelet restart."""

    def __init__(self, path: Path = SOCKET, timeout_s: float = TIMEOUT_S) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._messages = messages()
        self._channel = grpc.insecure_channel(
            f"unix:{path}",
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_reconnect_backoff_ms", 1000),  # a kubelet restart takes seconds
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._list = self._channel.unary_unary(
            LIST,
            request_serializer=self._messages["ListRequest"].SerializeToString,
            response_deserializer=self._messages["ListResponse"].FromString,
        )

    def list_allocations(self) -> dict[ContainerName, Allocation]:
        """Every container of this node that has something of Valve's. Raises PodResourcesError."""
        try:
            answer = self._list(self._messages["ListRequest"](), timeout=self._timeout_s)
        except grpc.RpcError as error:
            details = error.details() if isinstance(error, grpc.Call) else str(error)
            raise PodResourcesError(
                f"the kubelet does not answer at {self.path} ({details}): mount the kubelet's pod-resources "
                "folder into the agent"
            ) from error
        return allocations_of(answer.pod_resources)

    def close(self) -> None:
        self._channel.close()


def allocations_of(pods: Iterable[Any]) -> dict[ContainerName, Allocation]:
    """One entry per container; with topology the kubelet lists every device by itself, so they are added."""
    found: dict[ContainerName, Allocation] = {}
    for pod in pods:
        for container in pod.containers:
            ids: dict[str, list[str]] = {RESOURCE_ONLINE_GPU: [], RESOURCE_OFFLINE_MEMORY: []}
            for devices in container.devices:
                if devices.resource_name in ids:
                    ids[devices.resource_name] += devices.device_ids
            online, offline = ids[RESOURCE_ONLINE_GPU], ids[RESOURCE_OFFLINE_MEMORY]
            if online or offline:
                name = ContainerName(pod.namespace, pod.name, container.name)
                found[name] = Allocation(len(online), len(offline), tuple(sorted(online + offline)))
    return found
