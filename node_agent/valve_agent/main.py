# SPDX-License-Identifier: Apache-2.0
"""`valve agent`: puts the parts together, runs them, takes them apart.

Why it exists: the only place of the agent that reads arguments, environment and files. It keeps no state on
disk; SIGTERM closes cleanly, and kill -9 loses nothing that the runtimes do not bring back.

Threading model: the calling thread becomes the server thread. Beside it: the event writer, a hold worker for
every device and, if asked for, the metrics server. Gates are processes, one for every device. Called by
`valve_cli.main`.

Exit status: 0 after SIGTERM or SIGINT, 1 when the gate is lost, 2 when it cannot start as told.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from valve_agent import sockets
from valve_agent.agent import SLICE_NS, AgentFailed
from valve_agent.devices.base import DeviceError
from valve_agent.devices.cpu.kernel import set_slice
from valve_agent.events import EventLog, Labelled
from valve_agent.gate_link import GateDied, GateError
from valve_agent.parts import Parts, cpu_parts, nvidia_parts
from valve_agent.router import Router
from valve_agent.server import Server
from valve_agent.share import Share
from valve_agent.status import StatusSocket, document
from valve_agent.surroundings import OneMachine, Surroundings
from valve_api.errors import PolicyError

METRICS_PORT = 0
POD_RESOURCES = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
ALLOCATIONS = Path("/var/lib/valve/device-plugin")
DESCRIPTORS = 65_536
NICE = -10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--policy", metavar="FILE", help="a ColocationPolicy (YAML), on one machine")
    source.add_argument("--node", metavar="NAME", help="a Kubernetes node: settings from its ColocationNode")
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "nvidia"], help="which device to share (default: cpu)"
    )
    parser.add_argument(
        "--gpus",
        default="all",
        metavar="LIST",
        help="nvidia: which GPUs to share: all, or 0,2 (default: all)",
    )
    parser.add_argument(
        "--gpu-commit",
        default="none",
        choices=["none", "preempt", "restart"],
        help="nvidia: what must follow DISABLE_CHANNELS on this hardware (`make gpu` tells; default: none)",
    )
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help="where to listen (default: /run/valve/agent.sock)"
    )
    parser.add_argument(
        "--events", type=Path, metavar="FILE", help="append every event to this file, as JSON lines"
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=METRICS_PORT,
        metavar="N",
        help="Prometheus on port N (0: off)",
    )
    parser.add_argument(
        "--metrics-address", default="127.0.0.1", metavar="ADDRESS", help="where to serve it (127.0.0.1)"
    )
    kubernetes = parser.add_argument_group("with --node")
    kubernetes.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="the way to the cluster (default: the pod's account)",
    )
    for flag, metavar, default, text in (
        ("--pod-resources", "SOCKET", POD_RESOURCES, "the kubelet's pod-resources API"),
        ("--logs", "DIR", Path("/var/log"), "where the kubelet keeps pods/ and containers/"),
        ("--allocations", "DIR", ALLOCATIONS, "the device plugin's folder: which pod is on which GPU"),
    ):
        kubernetes.add_argument(flag, type=Path, metavar=metavar, default=default, help=text)


def main(arguments: argparse.Namespace) -> int:
    unusable: dict[str, str] = {}
    try:
        surroundings = _surroundings(arguments)
        parts = _parts(arguments, surroundings, unusable)
        path = arguments.socket or sockets.default_path(os.environ, os.getuid())
        _raise_descriptor_limit()
        _rise_above_tenants()
        listener = sockets.listen(path, 0o666)
    except (NoCluster, PolicyError, DeviceError, sockets.SocketTaken, OSError) as error:
        print(f"valve agent: {error}", file=sys.stderr)
        return 2
    several = len(parts) + len(unusable) > 1
    common_doorbell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if several else -1
    server = Server(listener)
    shares: list[Share] = []
    try:
        status_path = path.with_name(path.name + sockets.STATUS_SUFFIX)
        status_listener = sockets.listen(status_path, 0o600, sockets.STATUS_KIND)
        events = EventLog(arguments.events, sys.stderr)
        for one in parts:
            said = Labelled(events, gpu=one.info.uuid) if several else events
            try:
                shares.append(Share(one, server, surroundings, said, common_doorbell_fd))
            except DeviceError as error:
                unusable[one.info.uuid] = str(error)
        if not shares:
            raise _nothing(unusable)
    except (GateError, DeviceError, sockets.SocketTaken, OSError) as error:
        print(f"valve agent: {error}", file=sys.stderr)
        for share in shares:
            share.close()
        path.unlink(missing_ok=True)
        return 2
    status = StatusSocket(status_listener, surroundings.may_ask)

    def answer() -> dict[str, object]:
        return document(
            [share.snapshot() for share in shares], sum(share.agent.rejects for share in shares), unusable,
            surroundings.facts(),
        )  # fmt: skip

    server.watch(status.fileno(), lambda: status.answer(answer))
    metrics = None
    if arguments.metrics_port:
        from valve_agent.metrics import Collector, MetricsServer

        collector = Collector()
        metrics = MetricsServer(collector, arguments.metrics_port, arguments.metrics_address)

    def on_second() -> None:
        if metrics is None and not surroundings.wants_snapshots:
            return
        made = answer()
        if metrics is not None:
            collector.publish(made)
        surroundings.on_second(made)

    agents = [share.agent for share in shares]
    router = Router(
        agents, [share.parts.info for share in shares], on_second, common_doorbell_fd=common_doorbell_fd
    )
    if several:
        for agent in agents:
            agent.siblings = router
    surroundings.start(agents, [share.parts.gpu_bytes for share in shares])

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for share in shares:
        share.started(socket=str(path))
    for device, why in unusable.items():
        events.emit("unusable", level="error", gpu=device, why=why)
    gc.collect()
    gc.freeze()
    try:
        server.run(router)
    except (AgentFailed, GateDied) as error:
        events.emit("failed", level="error", why=str(error))
        return 1
    finally:
        events.emit("stop")
        for agent in agents:
            agent.closing = True
        if metrics is not None:
            metrics.close()
        path.unlink(missing_ok=True)
        status_path.unlink(missing_ok=True)
        status.close()
        server.close()
        surroundings.close()
        for share in shares:
            share.close()
        if several:
            os.close(common_doorbell_fd)
        events.close()
    return 0


def _parts(
    arguments: argparse.Namespace, surroundings: Surroundings, unusable: dict[str, str]
) -> list[Parts]:
    """Of every device to share; `unusable` gets those that cannot be (device -> why). Raises PolicyError,
    DeviceError."""
    if arguments.device == "cpu":
        return [cpu_parts(surroundings.settings)]
    found = nvidia_parts(surroundings.settings, arguments.gpus, arguments.gpu_commit, unusable)
    if not found:
        raise _nothing(unusable)
    if unusable:  # libcuda does not start where it sees a GPU that is lost
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(one.info.uuid for one in found)
    return found


def _nothing(unusable: Mapping[str, str]) -> DeviceError:
    """No device is left to share."""
    if len(unusable) == 1:
        return DeviceError(*unusable.values())
    return DeviceError("; ".join(f"{device}: {why}" for device, why in unusable.items()))


class NoCluster(Exception):
    """The agent is to run on a node and finds no way to its cluster."""


def _surroundings(arguments: argparse.Namespace) -> Surroundings:
    """Raises NoCluster. Kubernetes' part is loaded only where it is asked for."""
    if arguments.policy:
        return OneMachine(arguments.policy)
    from valve_agent.kube import node
    from valve_agent.kube.api import KubeError

    try:
        return node.from_arguments(
            arguments.node,
            arguments.kubeconfig,
            arguments.pod_resources,
            arguments.logs,
            arguments.allocations,
            os.environ,
        )
    except KubeError as error:
        raise NoCluster(str(error)) from error


def _raise_descriptor_limit() -> None:
    """Each tenant process costs about ten descriptors; the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _rise_above_tenants() -> None:
    """Both processes of the agent run for microseconds at a time, and an online request waits for them: on a
    busy machine they should not queue behind a hundred engine threads."""
    set_slice(0, SLICE_NS)
    try:
        os.nice(NICE)
    except PermissionError:  # not root: it works, only with a longer tail
        return
