# SPDX-License-Identifier: Apache-2.0
"""One resource's socket and its standing with the kubelet.

Why it exists: a kubelet that starts deletes every socket in its folder, knows no plugin, and tells nobody. It
also does not come back when it could not take a list. So a registration holds only while three things do: the
kubelet's socket is the one we registered at (inode and change time), ours is still in the folder, and
somebody listens to ListAndWatch. When one does not, the plugin serves and registers again.

Threading model: main's thread calls `keep`; gRPC's threads answer. Callers: main.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc

from valve_deviceplugin.errors import KubeletError
from valve_deviceplugin.log import Log
from valve_deviceplugin.metrics import Metrics
from valve_deviceplugin.plugin import ResourcePlugin
from valve_deviceplugin.timing import Timing
from valve_kubelet import calls
from valve_kubelet import deviceplugin_pb2 as dp
from valve_kubelet.podresources import reason

REGISTER_TIMEOUT_S = 15.0
"""The kubelet connects back to us before it answers, and gives that 10 s."""
RETRY_S = 1.0
GRACE_S = 1.0
"""For calls under way when a server stops."""
_THREADS = 8
Identity = tuple[int, int, int]


class Endpoint:
    """A ResourcePlugin, served and registered."""

    def __init__(
        self, plugin: ResourcePlugin, folder: Path, name: str, log: Log, metrics: Metrics,
        timing: Timing, on_register: Callable[[], None],
    ) -> None:  # fmt: skip
        """folder: the kubelet's device-plugins; name: of our socket in it."""
        self.plugin = plugin
        self._folder, self._name = folder, name
        self._log, self._metrics = log, metrics
        self._listen_s = timing.listen
        self._on_register = on_register
        self._server: grpc.Server | None = None
        self._own: Identity | None = None
        self._kubelet: Identity | None = None
        self._known = False
        """whether any kubelet has ever accepted us"""
        self._heard_s = 0.0
        """when the kubelet was last seen to listen, or accepted us"""
        self._retry_s = 0.0
        self.problem = "not registered yet"
        """Why the kubelet does not know us; empty when it does."""

    def keep(self, now_s: float) -> None:
        """Do what is needed to be registered. Returns soon; called several times a second."""
        kubelet = identity_of(self._folder / calls.KUBELET_SOCKET)
        if kubelet is None:
            self._kubelet = None
            self._say(f"no kubelet at {self._folder / calls.KUBELET_SOCKET}")
            return
        why = self._why_again(kubelet, now_s)
        if not why or now_s < self._retry_s:
            return
        try:
            if self._server is None or identity_of(self._folder / self._name) != self._own:
                self._serve()
            self._register()
        except (KubeletError, OSError) as error:
            self._retry_s = now_s + RETRY_S
            self._kubelet = None
            self._say(str(error))
            return
        self._kubelet, self._known, self._heard_s = kubelet, True, time.monotonic()
        self._on_register()
        self._metrics.registered(self.plugin.resource)
        self._log.emit("register", resource=self.plugin.resource, why=why)
        self._say("")

    def close(self) -> None:
        self.plugin.stop()
        if self._server is not None:
            self._server.stop(GRACE_S).wait()
            self._server = None
        if identity_of(self._folder / self._name) == self._own:
            (self._folder / self._name).unlink(missing_ok=True)

    def _why_again(self, kubelet: Identity, now_s: float) -> str:
        if self._kubelet is None:
            return "the kubelet is back" if self._known else "first registration"
        if kubelet != self._kubelet:
            return "the kubelet has started"
        if self._server is None or identity_of(self._folder / self._name) != self._own:
            return "our socket is gone"
        if self.plugin.watched:
            self._heard_s = now_s
        return "the kubelet does not listen" if now_s - self._heard_s > self._listen_s else ""

    def _serve(self) -> None:
        """A new server at our socket. gRPC removes the path that a server was bound to when it gets to it, so
        that is another one, and renamed. Raises KubeletError, OSError."""
        if self._server is not None:
            self._server.stop(None)
            self._server = None
        path = self._folder / self._name
        bound = self._folder / f".{self._name}.new"
        bound.unlink(missing_ok=True)
        server = grpc.server(
            futures.ThreadPoolExecutor(_THREADS, thread_name_prefix=self._name),
            handlers=[calls.plugin_handler(self.plugin)],
            options=[
                ("grpc.max_receive_message_length", calls.MESSAGE_BYTES_MAX),
                ("grpc.so_reuseport", 0),
            ],
        )
        try:
            server.add_insecure_port(f"unix:{bound}")
            os.rename(bound, path)
        except (RuntimeError, OSError) as error:
            server.stop(None)
            raise KubeletError(f"cannot listen at {path}: {error}") from error
        server.start()
        self._server, self._own = server, identity_of(path)

    def _register(self) -> None:
        """Raises KubeletError."""
        socket = self._folder / calls.KUBELET_SOCKET
        request = dp.RegisterRequest(
            version=calls.VERSION, endpoint=self._name, resource_name=self.plugin.resource,
            options=dp.DevicePluginOptions(get_preferred_allocation_available=True),
        )  # fmt: skip
        with calls.channel(socket) as channel:
            try:
                calls.REGISTER.call(channel)(request, timeout=REGISTER_TIMEOUT_S)
            except grpc.RpcError as error:
                raise KubeletError(
                    f"the kubelet at {socket} does not register us: {reason(error)}"
                ) from error

    def _say(self, problem: str) -> None:
        self.problem = problem
        self._log.changed(f"kubelet {self.plugin.resource}", problem, level="warning")


def identity_of(path: Path) -> Identity | None:
    """What tells one file of a name from the next: inodes are used again, so with the change time."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_ctime_ns)
