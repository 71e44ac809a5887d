# SPDX-License-Identifier: Apache-2.0
"""One resource's DevicePlugin service: the kubelet's calls, answered from the shared state.

Why it exists: it translates. Decisions are in allocator/, effects in state.py.

Allocate fails only for ids that were never ours. It never fails for lack of memory: a refusal makes a Failed
pod, its Deployment makes the next one, and a hundred follow within seconds. A container that was admitted
short waits in its runtime until the agent grants.

Threading model: gRPC's threads call it, several at once; ListAndWatch keeps one for as long as the kubelet
listens. Callers: serve.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import grpc

from valve_api.names import RESOURCE_ONLINE_GPU, Workload
from valve_deviceplugin.allocator.ledger import Entry
from valve_deviceplugin.injection import Injection
from valve_deviceplugin.metrics import Metrics
from valve_deviceplugin.state import Device, Node
from valve_kubelet import calls
from valve_kubelet import deviceplugin_pb2 as dp

WAIT_S = 5.0
"""How long a quiet ListAndWatch sleeps before it looks whether its kubelet is still there."""


class ResourcePlugin:
    def __init__(
        self, resource: str, node: Node, metrics: Metrics, inject: Callable[[Workload, Entry], Injection],
        on_allocate: Callable[[], None],
    ) -> None:  # fmt: skip
        self.resource = resource
        self.workload = Workload.ONLINE if resource == RESOURCE_ONLINE_GPU else Workload.OFFLINE
        self._node = node
        self._metrics = metrics
        self._inject = inject
        self._on_allocate = on_allocate
        self._stopping = threading.Event()
        self._streams = 0
        self._streams_lock = threading.Lock()

    @property
    def watched(self) -> bool:
        """Whether a kubelet listens to us."""
        return self._streams > 0

    def stop(self) -> None:
        """End every ListAndWatch."""
        self._stopping.set()
        self._node.wake()

    def options(self, _request: dp.Empty, _context: grpc.ServicerContext) -> dp.DevicePluginOptions:
        return dp.DevicePluginOptions(get_preferred_allocation_available=True)

    def list_and_watch(
        self, _request: dp.Empty, context: grpc.ServicerContext
    ) -> Iterator[dp.ListAndWatchResponse]:
        context.add_callback(self._node.wake)
        seen = -1
        self._count_stream(+1)
        try:
            while not self._stopping.is_set() and context.is_active():
                version, devices = self._node.devices(self.resource)
                if version != seen:
                    seen = version
                    answer = list_of(devices)
                    self._metrics.listed(self.resource, answer.ByteSize())
                    yield answer
                self._node.wait(self.resource, seen, WAIT_S)
        finally:
            self._count_stream(-1)

    def prefer(
        self, request: dp.PreferredAllocationRequest, _context: grpc.ServicerContext
    ) -> dp.PreferredAllocationResponse:
        answer = dp.PreferredAllocationResponse()
        for wanted in request.container_requests:
            picked = self._node.prefer(
                self.resource,
                wanted.available_deviceIDs,
                wanted.must_include_deviceIDs,
                wanted.allocation_size,
            )
            answer.container_responses.add(deviceIDs=picked)
        return answer

    def allocate(self, request: dp.AllocateRequest, context: grpc.ServicerContext) -> dp.AllocateResponse:
        started = time.perf_counter()
        answer = dp.AllocateResponse()
        for wanted in request.container_requests:
            entry = self._node.allocate(self.resource, frozenset(wanted.devices_ids))
            if entry is None:
                some = ", ".join(sorted(wanted.devices_ids)[:4])
                context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"{self.resource}: ids of no GPU of this node: {some}"
                )
                raise AssertionError("abort raises")
            answer.container_responses.append(response_of(self._inject(self.workload, entry)))
        self._on_allocate()
        self._metrics.allocate_took(self.resource, time.perf_counter() - started)
        return answer

    def _count_stream(self, step: int) -> None:
        with self._streams_lock:
            self._streams += step


def list_of(devices: list[Device]) -> dp.ListAndWatchResponse:
    answer = dp.ListAndWatchResponse()
    for device in devices:
        made = answer.devices.add(ID=device.id, health=calls.HEALTHY if device.healthy else calls.UNHEALTHY)
        if device.numa_node is not None:
            made.topology.nodes.add(ID=device.numa_node)
    return answer


def response_of(given: Injection) -> dp.ContainerAllocateResponse:
    return dp.ContainerAllocateResponse(
        envs=given.env,
        mounts=[
            dp.Mount(container_path=mount.container, host_path=mount.host, read_only=True)
            for mount in given.mounts
        ],
        cdi_devices=[dp.CDIDevice(name=name) for name in given.cdi],
    )
