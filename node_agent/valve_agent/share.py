# SPDX-License-Identifier: Apache-2.0
"""One device that the agent shares, put together: its memory, its gate, its Agent, the watch over it.

Why it exists: a node has several GPUs and one agent. What belongs to one GPU is made, looked at once a second
and closed here, and shares nothing with its neighbours but the server and the event log.

Threading model: made and closed by main; everything else in the server thread. Callers: main.py, router.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from valve_agent.agent import Agent
from valve_agent.devices.base import DeviceError
from valve_agent.devices.cpu.memory import CpuMemoryPool
from valve_agent.devices.nvidia.memory import NvidiaMemoryPool
from valve_agent.events import EventLog, Labelled
from valve_agent.gate_link import GateHandle
from valve_agent.gpu_limits import GpuLimits
from valve_agent.gpu_memory import open_memory
from valve_agent.gpu_watch import GpuWatch
from valve_agent.live import gate_settings
from valve_agent.parts import Parts
from valve_agent.policy.reservation import Reservation
from valve_agent.pool import Pool
from valve_agent.registry import Registry
from valve_agent.server import Server
from valve_agent.slab_moves import SlabMoves
from valve_agent.status import snapshot
from valve_agent.surroundings import Surroundings
from valve_agent.wire import Device
from valve_api.settings import EffectiveSettings


class Share:
    """See the module. Owns `parts`, also if making it fails."""

    def __init__(
        self,
        parts: Parts,
        server: Server,
        surroundings: Surroundings,
        events: EventLog | Labelled,
        common_doorbell_fd: int = -1,
    ) -> None:
        """`common_doorbell_fd`: what engines on several GPUs ring; -1: the machine has one device. Raises
        GateError, DeviceError."""
        self.parts = parts
        self.events = events
        settings = parts.settings
        try:
            self.memory = _memory(parts, lambda: self.agent.holds_standing > 0)
        except BaseException:
            parts.close()
            raise
        try:
            self.gate = GateHandle.start(parts.gate_device, gate_settings(settings), common_doorbell_fd)
        except BaseException:
            self.memory.shut_down()
            parts.close()
            raise
        registry = Registry()
        self.agent = Agent(
            settings=settings,
            server=server,
            gate=self.gate,
            memory=self.memory,
            registry=registry,
            identity=surroundings.identity(
                registry, os.getuid(), parts.info.uuid if common_doorbell_fd >= 0 else ""
            ),
            events=events,
            device=parts.device,
        )
        self.agent.pool = make_pool(settings, self.agent)
        self.agent.route = parts.route
        self.agent.on_second = self._on_second
        self._watch: GpuWatch | None = None
        if parts.processes is not None:
            self._watch = GpuWatch(parts.processes, lambda: self.agent.settings.unknown_processes == "Refuse")
        if isinstance(self.memory, NvidiaMemoryPool):
            seen = parts.processes or dict
            self.agent.moves = SlabMoves(self.memory, registry, self.agent)
            self.agent.limits = GpuLimits(registry, settings.slab_bytes, seen, self.agent.kill_process)
            if _is_unused(seen):
                self.memory.fill()  # nobody can hold any: it need not wait for those who come back

    @property
    def id(self) -> str:
        return self.parts.info.uuid

    def snapshot(self) -> dict[str, Any]:
        """See status.snapshot."""
        return snapshot(
            self.agent, self.parts.info, self.gate.stats(), huge_pages=self.memory.huge_pages,
            unknown_processes=self._watch.unknown if self._watch is not None else 0,
            now_ns=time.monotonic_ns(),
        )  # fmt: skip

    def started(self, socket: str) -> None:
        """Say what was started."""
        settings = self.parts.settings
        self.events.emit(
            "start", pid=os.getpid(), policy=settings.policy, device=self.parts.device.name.lower(),
            slabs=settings.slabs, slab_bytes=settings.slab_bytes, huge_pages=self.memory.huge_pages,
            lease_ms=settings.lease_ns // 1_000_000, compute=dict(self.parts.route) or None, socket=socket,
        )  # fmt: skip
        if self.memory.why_small_pages:
            self.events.emit("small-pages", level="warning", why=self.memory.why_small_pages)

    def close(self) -> None:
        self.agent.close()
        self.gate.close()
        self.memory.shut_down()
        self.parts.close()

    def _on_second(self) -> None:
        self.parts.watch(self.events.emit)
        if self._watch is not None:
            self.agent.judge(self._watch)


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
    return open_memory(parts.info.uuid, settings.slabs, settings.slab_bytes, hold_stands)


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
