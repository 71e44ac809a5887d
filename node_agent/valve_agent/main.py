# SPDX-License-Identifier: Apache-2.0
"""`valve agent`: puts the parts together, runs them, takes them apart.

Why it exists: the only place of the agent that reads arguments, environment and files. It keeps no state on
disk; SIGTERM closes cleanly, and kill -9 loses nothing that the runtimes do not bring back.

Threading model: the calling thread becomes the server thread. Beside it: the event writer, the hold worker
and, if asked for, the metrics server. The gate is a process. Called by `valve_cli.main`.

Exit status: 0 after SIGTERM or SIGINT, 1 when the gate is lost, 2 when it cannot start as told.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from valve_agent import sockets
from valve_agent.agent import SLICE_NS, Agent, AgentFailed
from valve_agent.devices.base import DeviceError
from valve_agent.devices.cpu.kernel import set_slice
from valve_agent.devices.cpu.memory import CpuMemoryPool
from valve_agent.devices.nvidia.memory import NvidiaMemoryPool
from valve_agent.events import EventLog
from valve_agent.gate_link import GateDied, GateError, GateHandle
from valve_agent.gpu_limits import GpuLimits
from valve_agent.gpu_memory import open_memory
from valve_agent.gpu_watch import GpuWatch
from valve_agent.live import gate_settings
from valve_agent.parts import Parts, cpu_parts, nvidia_parts
from valve_agent.policy.reservation import Reservation
from valve_agent.pool import Pool
from valve_agent.registry import Registry
from valve_agent.server import Server
from valve_agent.slab_moves import SlabMoves
from valve_agent.status import StatusSocket, snapshot
from valve_agent.surroundings import OneMachine, Surroundings
from valve_agent.wire import Device
from valve_api.errors import PolicyError
from valve_api.settings import EffectiveSettings

METRICS_PORT = 0
POD_RESOURCES = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
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
        ("--allocations", "DIR", None, "the device plugin's ledger, for nodes of several GPUs"),
    ):
        kubernetes.add_argument(flag, type=Path, metavar=metavar, default=default, help=text)


def main(arguments: argparse.Namespace) -> int:
    try:
        surroundings = _surroundings(arguments)
        parts = (
            nvidia_parts(surroundings.settings, commit=arguments.gpu_commit)
            if arguments.device == "nvidia"
            else cpu_parts(surroundings.settings)
        )
        settings = parts.settings
        path = arguments.socket or sockets.default_path(os.environ, os.getuid())
        _raise_descriptor_limit()
        _rise_above_tenants()
        listener = sockets.listen(path, 0o666)
    except (NoCluster, PolicyError, DeviceError, sockets.SocketTaken, OSError) as error:
        print(f"valve agent: {error}", file=sys.stderr)
        return 2
    try:
        status_path = path.with_name(path.name + sockets.STATUS_SUFFIX)
        status_listener = sockets.listen(status_path, 0o600, sockets.STATUS_KIND)
        events = EventLog(arguments.events, sys.stderr)
        memory = _memory(parts, lambda: agent.holds_standing > 0)
        gate = GateHandle.start(parts.gate_device, gate_settings(settings))
    except (GateError, DeviceError, sockets.SocketTaken, OSError) as error:
        print(f"valve agent: {error}", file=sys.stderr)
        parts.close()
        path.unlink(missing_ok=True)
        return 2
    server = Server(listener)
    registry = Registry()
    agent = Agent(
        settings=settings,
        server=server,
        gate=gate,
        memory=memory,
        registry=registry,
        identity=surroundings.identity(registry, os.getuid()),
        events=events,
        device=parts.device,
    )
    agent.pool = make_pool(settings, agent)
    agent.route = parts.route
    if isinstance(memory, NvidiaMemoryPool):
        seen = parts.processes or dict
        agent.moves = SlabMoves(memory, registry, agent)
        agent.limits = GpuLimits(registry, settings.slab_bytes, seen, agent.kill_process)
        if _is_unused(seen):
            memory.fill()  # nobody can hold any: it need not wait for those who come back
    status = StatusSocket(status_listener, surroundings.may_ask)

    def document() -> dict[str, object]:
        made = snapshot(agent, gate.stats(), huge_pages=memory.huge_pages, now_ns=time.monotonic_ns())
        return {**made, "cluster": surroundings.facts()}

    server.watch(status.fileno(), lambda: status.answer(document))
    watch = GpuWatch(parts.processes, settings.unknown_processes == "Refuse") if parts.processes else None
    metrics = None
    if arguments.metrics_port:
        from valve_agent.metrics import Collector, MetricsServer

        collector = Collector()
        metrics = MetricsServer(collector, arguments.metrics_port, arguments.metrics_address)

    def on_second() -> None:
        parts.watch(events.emit)
        if watch is not None:
            agent.judge(watch)
        if metrics is None and not surroundings.wants_snapshots:
            return
        made = document()
        if metrics is not None:
            collector.publish(made)
        surroundings.on_second(made)

    agent.on_second = on_second
    surroundings.start(agent)

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    events.emit(
        "start", socket=str(path), pid=os.getpid(), policy=settings.policy, device=arguments.device,
        slabs=settings.slabs, slab_bytes=settings.slab_bytes, huge_pages=memory.huge_pages,
        lease_ms=settings.lease_ns // 1_000_000, compute=dict(parts.route) or None,
    )  # fmt: skip
    if memory.why_small_pages:
        events.emit("small-pages", level="warning", why=memory.why_small_pages)
    gc.collect()
    gc.freeze()
    try:
        server.run(agent)
    except (AgentFailed, GateDied) as error:
        events.emit("failed", level="error", why=str(error))
        return 1
    finally:
        events.emit("stop")
        agent.closing = True
        if metrics is not None:
            metrics.close()
        path.unlink(missing_ok=True)
        status_path.unlink(missing_ok=True)
        status.close()
        server.close()
        agent.close()
        gate.close()
        surroundings.close()
        memory.shut_down()
        parts.close()
        events.close()
    return 0


def _is_unused(seen: Callable[[], Mapping[int, int]]) -> bool:
    """No process but this one uses the device; False where nobody knows."""
    try:
        return not seen().keys() - {os.getpid()}
    except DeviceError:
        return False


def _memory(parts: Parts, hold_stands: Callable[[], bool]) -> CpuMemoryPool | NvidiaMemoryPool:
    """Raises DeviceError."""
    settings = parts.settings
    if parts.device is Device.CPU:
        return CpuMemoryPool(settings.slab_bytes)
    return open_memory(parts.number, parts.uuid, settings.slabs, settings.slab_bytes, hold_stands)


def make_pool(settings: EffectiveSettings, agent: Agent) -> Pool:
    now = time.monotonic_ns()
    return Pool(
        slabs=settings.slabs,
        slab_bytes=settings.slab_bytes,
        reservation=Reservation(
            min_slabs=settings.reservation.min_slabs,
            max_slabs=settings.reservation.max_slabs,
            increase_factor=settings.reservation.factor,
            decrease_slabs=settings.reservation.decrease_slabs,
            quiet_period_ns=settings.reservation.quiet_ns,
            now_ns=now,
        ),
        max_reclaims_per_minute=settings.max_reclaims_per_minute,
        effects=agent,
        online_floor_slabs=settings.online_floor_slabs,
        recover_until_ns=now + settings.recovery_grace_ns,
    )


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
            arguments.node, arguments.kubeconfig, arguments.pod_resources, arguments.logs, os.environ
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
