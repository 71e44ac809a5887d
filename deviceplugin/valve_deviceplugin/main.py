# SPDX-License-Identifier: Apache-2.0
"""`python -m valve_deviceplugin`: puts the parts together, runs them, takes them apart.

    python -m valve_deviceplugin --library /opt/valve/VERSION [options]            serve
    python -m valve_deviceplugin install-runtime --from BUNDLE --to /opt/valve     init container

Why it exists: the only place of the plugin that reads arguments. It reads no environment.

Threading model: the calling thread keeps both resources registered, four times a second. Beside it: the agent
watcher, the reconciler, the allocations socket, the HTTP server if asked for, and gRPC's own threads.

Exit status: 0 after SIGTERM or SIGINT, 2 when it cannot start as told.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import FrameType

from valve_api.names import RESOURCE_OFFLINE_MEMORY, RESOURCE_ONLINE_GPU, RESOURCES, Workload
from valve_deviceplugin import cdi, install
from valve_deviceplugin.allocator.ledger import Entry
from valve_deviceplugin.errors import PluginError
from valve_deviceplugin.injection import Injection, Runtime, injection
from valve_deviceplugin.log import LEVELS, Log
from valve_deviceplugin.metrics import HttpServer, Metrics
from valve_deviceplugin.plugin import ResourcePlugin
from valve_deviceplugin.publish import AllocationsSocket
from valve_deviceplugin.serve import Endpoint
from valve_deviceplugin.state import Node
from valve_deviceplugin.store import Store
from valve_deviceplugin.timing import Timing
from valve_deviceplugin.watchers import AgentWatcher, Reconciler
from valve_kubelet.calls import KUBELET_SOCKET
from valve_kubelet.podresources import PodResources

LIST_TIMEOUT_S = 2.0
"""A kubelet that has just started is waited for."""
TURN_S = 0.25
STALL_S = 60.0
"""A main loop that has not turned for so long is not healthy; a registration may take 15 s."""
SOCKETS = {RESOURCE_ONLINE_GPU: "valve-online.sock", RESOURCE_OFFLINE_MEMORY: "valve-offline.sock"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["install-runtime"]:
            return install_runtime(_install_parser().parse_args(arguments[1:]))
        return serve(_parser().parse_args(arguments))
    except (PluginError, OSError) as error:
        print(f"valve_deviceplugin: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m valve_deviceplugin",
        description="Valve's device plugin of one node.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--library", required=True, metavar="DIR", help="the runtime on the host: /opt/valve/VERSION")
    add("--node", default="", metavar="NAME", help="the node's name, for the log")
    add("--agent-socket", type=Path, default=Path("/run/valve/agent.sock"), metavar="PATH")
    add("--kubelet-dir", type=Path, default=Path("/var/lib/kubelet"), metavar="DIR")
    add("--device-plugins", type=Path, metavar="DIR", help="default: KUBELET_DIR/device-plugins")
    add("--pod-resources", type=Path, metavar="PATH", help="default: KUBELET_DIR/pod-resources/kubelet.sock")
    add("--state-dir", type=Path, default=Path("/var/lib/valve/device-plugin"), metavar="DIR",
        help="the ledger; on the node's disk, for it must outlive a reboot")  # fmt: skip
    add("--injection", choices=["mounts", "cdi"], default="mounts",
        help="how containers get the runtime; cdi needs containerd 2, CRI-O or enable_cdi")  # fmt: skip
    add("--cdi-dir", type=Path, default=Path("/var/run/cdi"), metavar="DIR")
    add("--gpu-access", choices=["auto", "none", "env", "cdi"], default="auto",
        help="how containers get the GPU itself: NVIDIA_VISIBLE_DEVICES, nvidia.com/gpu of CDI; "
        "auto: env for GPUs, none for the cpu device")  # fmt: skip
    add("--metrics-port", type=int, default=0, metavar="N", help="/metrics and /healthz (0: off)")
    add("--metrics-address", default="127.0.0.1", metavar="ADDRESS")
    add("--log-level", choices=LEVELS, default="info")
    for field in dataclasses.fields(Timing):
        add(f"--{field.name.replace('_', '-')}", type=float, default=field.default, metavar="SECONDS",
            help=f"{field.metadata['help']} (default: {field.default:g})")  # fmt: skip
    return parser


def _install_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m valve_deviceplugin install-runtime", description="Put the runtime onto the node."
    )
    add = parser.add_argument
    add("--from", dest="bundle", type=Path, required=True, metavar="DIR", help="a bundle (runtime/build.py)")
    add(
        "--to",
        type=Path,
        default=Path("/opt/valve"),
        metavar="DIR",
        help="the host's folder, as mounted here",
    )
    add("--seen-as", default="", metavar="DIR", help="its path on the host (default: the same)")
    add("--as", dest="name", default="", metavar="NAME", help="default: the bundle's version")
    add("--prune", action="store_true", help="remove versions that no container uses")
    add("--state-dir", type=Path, default=Path("/var/lib/valve/device-plugin"), metavar="DIR")
    return parser


def install_runtime(arguments: argparse.Namespace) -> int:
    place = install.install(arguments.bundle, arguments.to, name=arguments.name, seen_as=arguments.seen_as)
    print(place)
    if arguments.prune:
        keep = install.versions_in_use(arguments.state_dir) | {place.name}
        for name in install.prune(arguments.to, keep):
            print(f"removed {name}")
    return 0


def serve(arguments: argparse.Namespace) -> int:
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    log = Log(sys.stderr, arguments.log_level)
    metrics = Metrics()
    timing = Timing(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Timing)})
    node = Node(
        Store(arguments.state_dir), log, metrics, arguments.library, timing, time.monotonic, time.time
    )
    metrics.watch(node)
    pods = PodResources(
        arguments.pod_resources or arguments.kubelet_dir / "pod-resources" / KUBELET_SOCKET, RESOURCES,
        timeout_s=LIST_TIMEOUT_S, patient=True,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        reconciler = Reconciler(pods, node, log, metrics, timing)
        published = AllocationsSocket(arguments.state_dir, node, reconciler)
        stack.callback(published.close)
        watcher = AgentWatcher(arguments.agent_socket, node, log, metrics)
        injector = Injector(arguments, node, log)
        turned = [time.monotonic()]
        if arguments.metrics_port:
            http = HttpServer(
                metrics, arguments.metrics_address, arguments.metrics_port, lambda: _stalled(turned[0])
            )
            stack.callback(http.close)
        folder = arguments.device_plugins or arguments.kubelet_dir / "device-plugins"
        endpoints = []
        for resource in RESOURCES:
            plugin = ResourcePlugin(resource, node, metrics, injector.inject, reconciler.hurry)
            endpoint = Endpoint(plugin, folder, SOCKETS[resource], log, metrics, timing, reconciler.unsettle)
            stack.callback(endpoint.close)
            endpoints.append(endpoint)
        watcher.look()  # the first list that the kubelet gets is the right one
        for part in (watcher, reconciler):
            part.start()
            stack.callback(part.close)
        published.start()
        log.emit("start", node=arguments.node, library=arguments.library, injection=arguments.injection)
        while not stop.is_set():
            turned[0] = time.monotonic()
            for endpoint in endpoints:
                endpoint.keep(turned[0])
            stop.wait(TURN_S)
        log.emit("stop")
    return 0


class Injector:
    """What a container of an entry is given, by the way that was asked for."""

    def __init__(self, arguments: argparse.Namespace, node: Node, log: Log) -> None:
        """With CDI, writes the specs of every version in the ledger. Raises OSError, PluginError."""
        self._socket = PurePosixPath(arguments.agent_socket)
        self._cdi_dir: Path = arguments.cdi_dir
        self._by_cdi = arguments.injection == "cdi"
        self._access: str = arguments.gpu_access
        self._log = log
        if not self._by_cdi:
            return
        if not cdi.usable(self._runtime(arguments.library)):
            raise PluginError(f"--library {arguments.library}: its last part is no CDI device name")
        libraries = node.libraries()
        for library in libraries:
            cdi.ensure(self._cdi_dir, self._runtime(library))
        cdi.keep_only(self._cdi_dir, libraries)

    def inject(self, workload: Workload, entry: Entry) -> Injection:
        runtime = self._runtime(entry.library)
        by_cdi = self._by_cdi
        if by_cdi:
            try:
                cdi.ensure(self._cdi_dir, runtime)
            except OSError as error:
                # an online pod must start all the same
                self._log.emit("cdi-spec", level="error", why=f"{error}; mounts are used instead")
                by_cdi = False
        access = self._access
        if access == "auto":
            access = "env" if entry.gpus and entry.gpus[0].startswith(("GPU-", "MIG-")) else "none"
        return injection(runtime, workload, entry.gpus, entry.units, by_cdi=by_cdi, gpu_access=access)

    def _runtime(self, library: str) -> Runtime:
        return Runtime(PurePosixPath(library), self._socket)


def _stalled(turned_s: float) -> str:
    ago = time.monotonic() - turned_s
    return f"the main loop has not turned for {ago:.0f} s" if ago > STALL_S else ""


if __name__ == "__main__":
    sys.exit(main())
