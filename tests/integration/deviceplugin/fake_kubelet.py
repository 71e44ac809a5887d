# SPDX-License-Identifier: Apache-2.0
"""A kubelet as a device plugin sees it: Registration, the client side of DevicePlugin, pod-resources.

What it does as the real one does (pkg/kubelet/cm/devicemanager, read at 1.36): deletes every socket of its
folder when it starts; connects back before it answers Register; receives at most 4 MiB; picks ids at random
from the preferred and then from the free ones; keeps what a container got over its own restart; refuses an
admission whose ids are not Healthy any more; lists no non-restartable init container. It does not schedule,
and starts nothing.

Threading model: gRPC's threads register and listen; tests call `admit` from one thread.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from valve_kubelet import calls
from valve_kubelet import deviceplugin_pb2 as dp
from valve_kubelet import podresources_pb2 as pr

KUBELET_MESSAGE_BYTES_MAX = 4 << 20
"""grpc-go's default; the kubelet sets no other."""


class AdmissionFailed(Exception):
    """What makes a pod Failed with UnexpectedAdmissionError."""


@dataclass
class Given:
    """What a container has: ids by resource, and the plugin's answer."""

    ids: dict[str, frozenset[str]] = field(default_factory=dict)
    answers: dict[str, dp.ContainerAllocateResponse] = field(default_factory=dict)
    listed: bool = True


@dataclass
class Resource:
    endpoint: str
    channel: grpc.Channel
    devices: dict[str, bool] = field(default_factory=dict)
    lists: list[dp.ListAndWatchResponse] = field(default_factory=list)
    error: grpc.RpcError | None = None


class FakeKubelet:
    def __init__(self, folder: Path, seed: int = 1) -> None:
        """folder: holds device-plugins/ and pod-resources/."""
        self.plugins = folder / "device-plugins"
        self.pod_resources = folder / "pod-resources" / "kubelet.sock"
        self.pods: dict[tuple[str, str, str], Given] = {}
        """(namespace, pod, container) -> what it has; kept over restarts, as by the checkpoint"""
        self.resources: dict[str, Resource] = {}
        self.registrations: list[str] = []
        self.receive_bytes_max = KUBELET_MESSAGE_BYTES_MAX
        self.random = random.Random(seed)
        self._changed = threading.Condition()
        self._servers: list[grpc.Server] = []
        for path in (self.plugins, self.pod_resources.parent):
            path.mkdir(mode=0o750, parents=True, exist_ok=True)

    def start(self) -> None:
        """Delete every socket, then listen."""
        for path in self.plugins.iterdir():
            path.unlink()
        self.pod_resources.unlink(missing_ok=True)
        self._servers = [
            self._serve(
                self.plugins / calls.KUBELET_SOCKET, "v1beta1.Registration",
                {"Register": calls.unary(calls.REGISTER, self._register)},
            ),
            self._serve(
                self.pod_resources, "v1.PodResourcesLister",
                {"List": calls.unary(calls.LIST_PODS, self._list)},
            ),
        ]  # fmt: skip

    def stop(self) -> None:
        """The kubelet's own sockets go, the plugins' stay."""
        for server in self._servers:
            server.stop(None).wait()
        self._servers = []
        for resource in self.resources.values():
            resource.channel.close()
        self.resources = {}

    def admit(
        self,
        container: str,
        requests: dict[str, int],
        *,
        pod: str = "pod",
        namespace: str = "default",
        reuse: dict[str, frozenset[str]] | None = None,
        listed: bool = True,
        prefer: bool = True,
    ) -> Given:
        """Allocate for one container, as at a pod's admission. Raises AdmissionFailed."""
        key = (namespace, pod, container)
        given = self.pods.get(key, Given(listed=listed))
        for resource, count in requests.items():
            if resource in given.ids:
                if not given.ids[resource] <= self._healthy(resource):
                    raise AdmissionFailed("previously allocated devices are no longer healthy")
                continue
            ids = self._pick(resource, count, (reuse or {}).get(resource, frozenset()), prefer)
            shuffled = sorted(ids)
            self.random.shuffle(shuffled)
            wanted = dp.ContainerAllocateRequest(devices_ids=shuffled)
            request = dp.AllocateRequest(container_requests=[wanted])
            try:
                answer = calls.ALLOCATE.call(self._resource(resource).channel)(request, timeout=10)
            except grpc.RpcError as error:
                raise AdmissionFailed(str(error)) from error
            given.ids[resource] = ids
            given.answers[resource] = answer.container_responses[0]
        self.pods[key] = given
        return given

    def forget(self, pod: str, namespace: str = "default") -> None:
        """The pod is gone; its ids are free."""
        for key in [key for key in self.pods if key[:2] == (namespace, pod)]:
            del self.pods[key]

    def capacity(self, resource: str) -> tuple[int, int]:
        """(capacity, allocatable) as the node shows them."""
        found = self.resources.get(resource)
        if found is None:
            return (0, 0)
        return len(found.devices), sum(found.devices.values())

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        """Until condition() holds; it is looked at after every list and registration, and every 50 ms."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                assert left > 0, f"{what}: not within {timeout_s} s"
                self._changed.wait(min(left, 0.05))

    def _pick(self, resource: str, count: int, reuse: frozenset[str], prefer: bool) -> frozenset[str]:
        """The kubelet's choice: what may be reused, then what is preferred, then any; in random order."""
        healthy = self._healthy(resource)
        if not healthy:
            raise AdmissionFailed("no healthy devices present")
        taken = {token for given in self.pods.values() for token in given.ids.get(resource, ())}
        picked = set(self._shuffled(reuse)[:count])
        free = healthy - taken
        if len(free) < count - len(picked):
            raise AdmissionFailed(f"requested {count} of {resource}, {len(free)} are available")
        if len(picked) < count and prefer:
            request = dp.PreferredAllocationRequest(
                container_requests=[
                    dp.ContainerPreferredAllocationRequest(
                        available_deviceIDs=self._shuffled(free | picked),
                        must_include_deviceIDs=self._shuffled(picked),
                        allocation_size=count,
                    )
                ]
            )
            answer = calls.PREFER.call(self._resource(resource).channel)(request, timeout=10)
            preferred = set(answer.container_responses[0].deviceIDs) & free
            picked |= set(self._shuffled(preferred)[: count - len(picked)])
        picked |= set(self._shuffled(free - picked)[: count - len(picked)])
        return frozenset(picked)

    def _shuffled(self, ids: frozenset[str] | set[str]) -> list[str]:
        found = sorted(ids)
        self.random.shuffle(found)
        return found

    def _resource(self, name: str) -> Resource:
        try:
            return self.resources[name]
        except KeyError:
            raise AdmissionFailed(f"cannot allocate unregistered device {name}") from None

    def _healthy(self, name: str) -> set[str]:
        return {token for token, healthy in self._resource(name).devices.items() if healthy}

    def _serve(
        self, socket: Path, service: str, methods: dict[str, grpc.RpcMethodHandler[object, object]]
    ) -> grpc.Server:
        server = grpc.server(
            futures.ThreadPoolExecutor(4),
            handlers=[grpc.method_handlers_generic_handler(service, methods)],
            options=[("grpc.so_reuseport", 0)],
        )
        socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        return server

    def _register(self, request: dp.RegisterRequest, context: grpc.ServicerContext) -> dp.Empty:
        if request.version != calls.VERSION:
            context.abort(grpc.StatusCode.UNKNOWN, f"unsupported version {request.version}")
        channel = grpc.insecure_channel(
            f"unix:{self.plugins / request.endpoint}",
            options=[
                ("grpc.max_receive_message_length", self.receive_bytes_max),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.default_authority", "localhost"),
            ],
        )
        grpc.channel_ready_future(channel).result(timeout=10)
        before = self.resources.get(request.resource_name)
        if before is not None:
            before.channel.close()
        resource = Resource(request.endpoint, channel)
        with self._changed:
            self.resources[request.resource_name] = resource
            self.registrations.append(request.resource_name)
            self._changed.notify_all()
        threading.Thread(target=self._listen, args=(resource,), daemon=True).start()
        return dp.Empty()

    def _listen(self, resource: Resource) -> None:
        stream: Iterator[dp.ListAndWatchResponse] = resource.channel.unary_stream(
            calls.LIST_AND_WATCH,
            request_serializer=dp.Empty.SerializeToString,
            response_deserializer=dp.ListAndWatchResponse.FromString,
        )(dp.Empty())
        try:
            for answer in stream:
                with self._changed:
                    resource.lists.append(answer)
                    resource.devices = {d.ID: d.health == calls.HEALTHY for d in answer.devices}
                    self._changed.notify_all()
        except (grpc.RpcError, ValueError) as error:  # ValueError: our own channel is closed
            resource.error = error if isinstance(error, grpc.RpcError) else None
        with self._changed:
            resource.devices = dict.fromkeys(resource.devices, False)
            self._changed.notify_all()

    def _list(
        self, _request: pr.ListPodResourcesRequest, _context: grpc.ServicerContext
    ) -> pr.ListPodResourcesResponse:
        answer = pr.ListPodResourcesResponse()
        for (namespace, pod, container), given in sorted(self.pods.items()):
            if not given.listed:
                continue
            made = answer.pod_resources.add(name=pod, namespace=namespace).containers.add(name=container)
            for resource, ids in given.ids.items():
                made.devices.add(resource_name=resource, device_ids=sorted(ids))
        return answer
