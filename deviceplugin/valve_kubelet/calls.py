# SPDX-License-Identifier: Apache-2.0
"""Services and methods of the kubelet's APIs, typed: what protoc's own service code leaves untyped.

Why it exists: a method is a path, a request type and an answer type; written once here, the plugin, the
pod-resources client and the tests' kubelet cannot disagree on them.

Threading model: constants and pure constructors; channels and servers are thread-safe in gRPC itself.
Callers: valve_deviceplugin (serve, registration, podresources), the tests' fake kubelet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from valve_kubelet import deviceplugin_pb2 as dp
from valve_kubelet import podresources_pb2 as pr

VERSION = "v1beta1"
HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"
KUBELET_SOCKET = "kubelet.sock"
"""In the kubelet's device-plugins folder, and in its pod-resources folder."""
MESSAGE_BYTES_MAX = 64 << 20
"""What we receive: the kubelet asks with every free id of a resource, 2.7 MB for 56,000 of them, and gRPC's
own limit is 4 MiB. What we send is bound by the kubelet's 4 MiB, which cannot be raised."""

Request = TypeVar("Request", bound=Message)
Answer = TypeVar("Answer", bound=Message)


class Method(NamedTuple, Generic[Request, Answer]):
    """One unary call."""

    path: str
    request: type[Request]
    answer: type[Answer]

    def call(self, channel: grpc.Channel) -> grpc.UnaryUnaryMultiCallable[Request, Answer]:
        return channel.unary_unary(
            self.path,
            request_serializer=self.request.SerializeToString,
            response_deserializer=self.answer.FromString,
        )


REGISTER = Method("/v1beta1.Registration/Register", dp.RegisterRequest, dp.Empty)
OPTIONS = Method("/v1beta1.DevicePlugin/GetDevicePluginOptions", dp.Empty, dp.DevicePluginOptions)
PREFER = Method(
    "/v1beta1.DevicePlugin/GetPreferredAllocation",
    dp.PreferredAllocationRequest,
    dp.PreferredAllocationResponse,
)
ALLOCATE = Method("/v1beta1.DevicePlugin/Allocate", dp.AllocateRequest, dp.AllocateResponse)
LIST_AND_WATCH = "/v1beta1.DevicePlugin/ListAndWatch"
LIST_PODS = Method("/v1.PodResourcesLister/List", pr.ListPodResourcesRequest, pr.ListPodResourcesResponse)


class DevicePlugin(Protocol):
    """What a plugin answers. Called from gRPC's threads, several at once."""

    def options(self, request: dp.Empty, context: grpc.ServicerContext) -> dp.DevicePluginOptions: ...

    def list_and_watch(
        self, request: dp.Empty, context: grpc.ServicerContext
    ) -> Iterator[dp.ListAndWatchResponse]: ...

    def prefer(
        self, request: dp.PreferredAllocationRequest, context: grpc.ServicerContext
    ) -> dp.PreferredAllocationResponse: ...

    def allocate(self, request: dp.AllocateRequest, context: grpc.ServicerContext) -> dp.AllocateResponse: ...


def plugin_handler(plugin: DevicePlugin) -> grpc.GenericRpcHandler:
    """The DevicePlugin service of one plugin."""
    stream = grpc.unary_stream_rpc_method_handler(
        plugin.list_and_watch,
        request_deserializer=dp.Empty.FromString,
        response_serializer=dp.ListAndWatchResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(
        "v1beta1.DevicePlugin",
        {
            "GetDevicePluginOptions": unary(OPTIONS, plugin.options),
            "ListAndWatch": stream,
            "GetPreferredAllocation": unary(PREFER, plugin.prefer),
            "Allocate": unary(ALLOCATE, plugin.allocate),
        },
    )


def unary(
    method: Method[Request, Answer], answer: Callable[[Request, grpc.ServicerContext], Answer]
) -> grpc.RpcMethodHandler[Request, Answer]:
    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=method.request.FromString,
        response_serializer=method.answer.SerializeToString,
    )


def channel(socket: Path) -> grpc.Channel:
    """A channel to a unix socket; it connects when it is used, and again after a loss."""
    return grpc.insecure_channel(
        f"unix:{socket}",
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.enable_http_proxy", 0),
            ("grpc.default_authority", "localhost"),
        ],
    )
