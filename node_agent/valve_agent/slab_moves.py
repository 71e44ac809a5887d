# SPDX-License-Identifier: Apache-2.0
"""Moving slabs on a device whose agent does it itself, and only while offline is off the device.

Why it exists: on `cpu` a runtime maps what it is granted and remaps what it returns. On a GPU the agent
changes a tenant's mappings, and may do so to an offline process only under a hold. So what the pool decides
(grant, take back) waits here for a hold, all that waits shares one, and only then the runtime hears of it.
Online waits for nothing: its grants are mapped at once.

Also here is the memory connection of a process (valve_protocol.h): how its arena begins, and, where the
agent cannot map (route BY_TENANT), how libvalve is told to and how its answer is awaited.

Threading model: the server thread only. Callers: agent.py.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from valve_agent import wire
from valve_agent.connection import Connection, Kind
from valve_agent.devices.base import ArenaError, DeviceError, OutOfDeviceMemory
from valve_agent.devices.nvidia.memory import NvidiaArena, NvidiaMemoryPool
from valve_agent.identity import IdentityError
from valve_agent.pool import ANSWER_TIMEOUT_NS, RETRY_NS, Holder
from valve_agent.registry import Process, Registry
from valve_agent.wire import MemoryRoute, RejectCode, Role, bits

FILL_SLABS = 64
"""Slabs made in one second."""
MAPS_MAX = 64 * wire.MEMORY_BATCH
"""Slabs that one process is asked to map at a time: no more frames than its connection takes."""
ENDING_NS = 1_000_000_000
"""A process that ends closes its memory connection first; one that is still there after so long goes on
without."""


class Owner(Protocol):
    """What the moves need of agent.py."""

    def hold_for_moves(self) -> None:
        """Ask for a hold; answered by `SlabMoves.on_held`."""
        ...

    def release(self) -> None: ...

    def arena_limit(self, process: Process) -> int:
        """Most slabs that an arena of this process may have."""
        ...

    def returned(self, holder: Holder, mask: int) -> None:
        """The pool takes these slabs back."""
        ...

    def send_to(self, process: Process, frame: wire.Frame) -> None: ...

    def kill_process(self, process: Process, why: str) -> None: ...

    def emit_for(self, process: Process, event: str, *, level: str = "info", **fields: object) -> None: ...

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None: ...

    def now_ns(self) -> int: ...


@dataclass(eq=False, slots=True)
class _Await:
    """A request to the memory thread of a process (route BY_TENANT)."""

    why: str
    """What it failed to do if no answer comes."""
    ends_hold: bool
    granted: int = 0
    """The runtime hears of these once they are mapped."""
    returned: int = 0
    """The pool hears of these once quarantine lies there."""
    then: Callable[[], None] | None = None


@dataclass(eq=False, slots=True)
class _Side:
    """A process's memory connection and what has not been mapped yet."""

    process: Process
    connection: Connection | None
    arena: NvidiaArena
    base: int = 0
    uvm_fds: list[int] | None = None
    """The process has mapped its quarantine and waits for a hold."""
    ready: bool = False
    """The process has been told its route."""
    granting: int = 0
    returning: int = 0
    failed: int = 0
    """Counted as held, but nothing of the agent's lies there: the pool gets them back, later."""
    awaited: dict[int, _Await] = field(default_factory=dict)
    """Number of the request -> what was asked, in the order in which the process works it off."""
    due_ns: int | None = None
    """When the next answer must be here. It runs from the last one: until then the next was not begun."""
    lost_ns: int | None = None
    """When a connection was lost that is needed."""

    @property
    def is_mapping(self) -> bool:
        return any(waits.granted for waits in self.awaited.values())


class SlabMoves:
    def __init__(self, memory: NvidiaMemoryPool, registry: Registry, owner: Owner) -> None:
        self.memory = memory
        self._registry = registry
        self._owner = owner
        self._sides: dict[int, _Side] = {}
        """Main pid -> its side."""
        self._ids = itertools.count(1)
        self._asked = False
        self._holding = False
        self._retry_ns = 0

    # The memory connection --------------------------------------------------------------------------

    def every_second(self) -> None:
        """Clear up what could not be done at once. Make slabs ahead of need, a few at a time: one takes the
        driver some hundred microseconds."""
        for side in list(self._sides.values()):
            if side.lost_ns is not None and self._owner.now_ns() - side.lost_ns >= ENDING_NS:
                side.lost_ns = None
                self._fail(side, "its memory thread is gone: its memory cannot be taken back")
            failed, side.failed = side.failed, 0
            if failed and side.process.memory is not None:
                self._owner.returned(side.process.memory.holder, failed)
        try:
            self.memory.fill(FILL_SLABS)
        except DeviceError as error:
            self._owner.emit("slabs-missing", level="error", why=str(error))

    def on_open(self, connection: Connection, frame: wire.MemoryOpen) -> None:
        """The first frame of a memory connection. Raises IdentityError."""
        process = self._registry.processes.get(connection.peer.pid)
        if process is None or process.link is None:
            raise IdentityError(
                RejectCode.EIDENTITY,
                f"process {connection.peer.pid} asks for GPU memory but is not attached: start it with "
                "`valve run`",
            )
        connection.kind = Kind.MEMORY
        known = self._sides.get(process.pid)
        if process.memory is not None or (known is not None and known.ready):
            self._deny(process, connection, "a process has one arena, and this one has it already")
            return
        if bytes(frame.gpu) != self.memory.gpu:
            self._deny(
                process, connection,
                f"this process uses GPU {bytes(frame.gpu).hex()}, the agent shares {self.memory.gpu.hex()}: "
                "set CUDA_VISIBLE_DEVICES to that one",
            )  # fmt: skip
            return
        most = self._owner.arena_limit(process)
        if not 0 < frame.slabs <= most:
            self._deny(
                process, connection,
                f"an arena of {frame.slabs * self.memory.slab_bytes >> 20}Mi is more than the "
                f"{most * self.memory.slab_bytes >> 20}Mi that this tenant may have: give the engine less KV "
                "cache",
            )  # fmt: skip
            return
        if known is not None:
            self._drop(known)  # it began before and failed
        try:
            arena = self.memory.prepare(int(frame.slabs), process.tenant.role == Role.OFFLINE)
        except DeviceError as error:
            self._deny(process, connection, str(error))
            return
        self._sides[process.pid] = _Side(process, connection, arena)
        connection.send(
            wire.Memory(
                slabs=arena.slabs, slab_bytes=self.memory.slab_bytes, quarantine_bytes=arena.quarantine_bytes
            ),
            [arena.quarantine_fd],
        )

    def on_frame(self, connection: Connection, frame: wire.Frame, fds: list[int]) -> None:
        """A later frame of a memory connection. Owns the descriptors. Raises WireError."""
        side = self._side_of(connection)
        if side is not None and isinstance(frame, wire.MemoryMapped) and not side.arena.base:
            if frame.slabs == side.arena.slabs and frame.base and side.uvm_fds is None:
                side.base, side.uvm_fds = int(frame.base), fds
                self._wait_for_hold(side)
                return
        elif side is not None and isinstance(frame, wire.MemoryDone) and not fds:
            self._on_done(side, int(frame.id), int(frame.result))
            return
        for fd in fds:
            os.close(fd)
        raise wire.BadField(f"{frame.TYPE.name} is not expected now on a memory connection")

    def on_closed(self, connection: Connection) -> None:
        side = self._side_of(connection)
        if side is None:
            return
        side.connection = None
        side.awaited.clear()
        side.due_ns = None
        if not side.ready:
            self._drop(side)
        elif side.arena.route == MemoryRoute.BY_TENANT:
            side.lost_ns = self._owner.now_ns()
            side.failed |= side.granting
            side.granting = 0
        self._end_hold()

    def claim(self, process: Process) -> NvidiaArena:
        """The arena that this process has reserved. Raises ArenaError if it has not."""
        side = self._sides.get(process.pid)
        if side is None or not side.ready:
            return self.memory.create(0)
        return side.arena

    def adopt(self, process: Process, arena: NvidiaArena, base: int, held: int) -> None:
        """A process came back with an arena that an earlier agent made. Raises ArenaError."""
        self.memory.adopt(arena, base, bits(held), process.tenant.role == Role.OFFLINE)
        self._sides[process.pid] = _Side(process, None, arena)

    def gone(self, process: Process) -> None:
        """The process, or the address space with its arena, exists no more; its memory is released next."""
        side = self._sides.pop(process.pid, None)
        if side is None:
            return
        self.memory.gone(side.arena)
        if process.memory is None:
            self._close_arena(side)
        self._end_hold()

    # Moves ------------------------------------------------------------------------------------------

    def grant(self, process: Process, mask: int) -> None:
        """Map these and tell the runtime; offline waits for a hold."""
        side = self._sides[process.pid]
        side.granting |= mask
        self._wait_for_hold(side)

    def give_back(self, process: Process, mask: int) -> None:
        """The runtime returned these, or never heard of their grant. The pool hears of it when quarantine
        lies there."""
        side = self._sides[process.pid]
        side.granting &= ~mask
        side.failed &= ~mask
        for waits in side.awaited.values():
            waits.granted &= ~mask  # mapped or not, quarantine comes next
            mask &= ~waits.returned  # it is asked to already
        if not mask:
            return
        if side.arena.offline:
            side.returning |= mask
            self._wait_for_hold(side)
        else:
            self._take(side, mask)

    def reclaim(self, process: Process, frame: wire.Reclaim) -> None:
        """Under the pool's hold: the runtime marks the slabs as lost, and `discard` remaps them. Where the
        tenant remaps, it does so first."""
        side = self._sides[process.pid]
        side.granting &= ~int(frame.set)  # or its grant would follow the loss
        if side.arena.route == MemoryRoute.BY_TENANT:
            then = functools.partial(self._owner.send_to, process, frame)
            waits = _Await("it did not remap reclaimed memory in time", ends_hold=False, then=then)
            self._ask_quarantine(side, int(frame.set), waits)
        else:
            self._owner.send_to(process, frame)

    def forget(self, process: Process, mask: int) -> None:
        """These slabs are taken back: what was not mapped yet will not be."""
        side = self._sides.get(process.pid)
        if side is not None:
            side.granting &= ~mask
            side.returning &= ~mask
            side.failed &= ~mask
            for waits in side.awaited.values():
                waits.granted &= ~mask
                waits.returned &= ~mask

    def on_held(self, ok: bool, why: str) -> None:
        """The answer to `hold_for_moves`."""
        self._asked = False
        if not ok:
            self._retry_ns = self._owner.now_ns() + RETRY_NS
            for side in self._waiting():
                self._owner.emit_for(
                    side.process, "moves-wait", level="warning", why=f"offline could not be paused: {why}"
                )
            return
        self._holding = True
        while waiting := self._waiting():
            for side in waiting:
                self._move(side)
        self._end_hold()

    def tick(self, now_ns: int) -> None:
        """Let time pass: answers that did not come, holds to ask for again."""
        for side in [s for s in self._sides.values() if s.due_ns is not None and now_ns >= s.due_ns]:
            side.due_ns = None
            self._fail(side, next(iter(side.awaited.values())).why)
        self._end_hold()
        if self._retry_ns and now_ns >= self._retry_ns:
            self._retry_ns = 0
            for side in self._waiting()[:1]:
                self._wait_for_hold(side)

    def deadline_ns(self) -> int | None:
        times = [side.due_ns for side in self._sides.values() if side.due_ns is not None]
        if self._retry_ns:
            times.append(self._retry_ns)
        return min(times, default=None)

    # Under a hold -----------------------------------------------------------------------------------

    def _waiting(self) -> list[_Side]:
        return [
            side
            for side in self._sides.values()
            if side.uvm_fds is not None or side.returning or (side.granting and not side.is_mapping)
        ]

    def _wait_for_hold(self, side: _Side) -> None:
        if not side.arena.offline:
            self._move(side)
        elif not self._asked and not self._holding and not self._retry_ns:
            self._asked = True
            self._owner.hold_for_moves()

    def _move(self, side: _Side) -> None:
        fds, side.uvm_fds = side.uvm_fds, None
        if fds is not None:
            self._attach(side, fds)
        returning, side.returning = side.returning, 0
        if returning:
            self._take(side, returning)
        if side.granting and not side.is_mapping:
            by_agent = side.arena.route == MemoryRoute.BY_AGENT
            slabs = itertools.islice(bits(side.granting), None if by_agent else MAPS_MAX)
            part = sum(1 << index for index in slabs)
            side.granting &= ~part
            self._map(side, part)

    def _attach(self, side: _Side, fds: list[int]) -> None:
        try:
            self.memory.attach(side.arena, side.base, fds)
        except ArenaError as error:
            for fd in fds:
                os.close(fd)
            self._refuse(side, str(error))
            return
        if side.arena.route == MemoryRoute.BY_TENANT and side.arena.offline:
            # Does libcuda remap while the channels are disabled, or does it wait for them (E8)?
            why = (
                "the GPU driver takes no mappings from the agent, and libcuda does not remap while this "
                "process is paused: its memory could never be taken back (docs/architecture.md, GPU memory)"
            )
            self._ask_quarantine(
                side, 1, _Await(why, ends_hold=True, then=functools.partial(self._ready, side))
            )
        else:
            self._ready(side)

    def _ready(self, side: _Side) -> None:
        side.ready = True
        self._owner.emit_for(side.process, "memory-route", route=side.arena.route.name.lower())
        if side.connection is not None:
            side.connection.send(wire.MemoryReady(route=side.arena.route))

    def _map(self, side: _Side, mask: int) -> None:
        if side.arena.route == MemoryRoute.BY_TENANT and side.connection is None:
            side.failed |= mask  # it ends, or `every_second` says that it does not
            return
        try:
            given = self.memory.grant(side.arena, bits(mask))
        except OutOfDeviceMemory as error:  # its arena is as it was
            self._not_granted(side, mask, str(error))
            return
        except DeviceError as error:
            self._cannot_map(side, mask, error)
            return
        granted = sum(1 << index for index in given)
        if side.arena.route == MemoryRoute.BY_AGENT:
            self._tell(side, granted)
        else:
            self._ask_maps(side, given)
        if granted != mask:
            self._not_granted(
                side,
                mask & ~granted,
                f"the GPU gave {len(given)} of {mask.bit_count()} slabs: lower spec.memory.pool in the "
                "policy, or end what else uses its memory",
            )

    def _cannot_map(self, side: _Side, mask: int, error: DeviceError) -> None:
        if side.arena.offline:
            self._kill(side, f"memory cannot be granted to it: {error}")
        else:
            self._not_granted(side, mask, str(error))

    def _not_granted(self, side: _Side, mask: int, why: str) -> None:
        """Nor what waits behind these. Given back by `every_second`: the pool itself may be calling now."""
        side.failed |= mask | side.granting
        side.granting = 0
        self._owner.emit_for(side.process, "grant-failed", level="error", why=why)

    def _tell(self, side: _Side, granted: int) -> None:
        if not granted:
            return
        frame = wire.Grant(id=0, at_ns=self._owner.now_ns(), set=wire.Bitmap.from_int(granted))
        self._owner.send_to(side.process, frame)

    def _take(self, side: _Side, mask: int) -> None:
        memory = side.process.memory
        if memory is None:
            return
        if side.arena.route == MemoryRoute.BY_AGENT:
            self._owner.returned(memory.holder, mask)
            return
        why = "it did not remap returned memory in time"
        self._ask_quarantine(side, mask, _Await(why, ends_hold=side.arena.offline, returned=mask))

    # Route BY_TENANT --------------------------------------------------------------------------------

    def _ask_maps(self, side: _Side, given: list[int]) -> None:
        for start in range(0, len(given), wire.MEMORY_BATCH):
            batch = given[start : start + wire.MEMORY_BATCH]
            frame = wire.MemoryMap(id=next(self._ids), count=len(batch))
            fds: list[int] = []
            try:
                for place, index in enumerate(batch):
                    frame.slab[place] = index
                    fds.append(self.memory.export(side.arena, index))
                granted = sum(1 << index for index in batch)
                why = "it did not map granted memory in time"
                self._ask(side, frame, fds, _Await(why, ends_hold=side.arena.offline, granted=granted))
            except DeviceError as error:
                self._cannot_map(side, sum(1 << index for index in given[start:]), error)
                return
            finally:
                for fd in fds:
                    os.close(fd)

    def _ask_quarantine(self, side: _Side, mask: int, waits: _Await) -> None:
        frame = wire.MemoryQuarantine(id=next(self._ids), set=wire.Bitmap.from_int(mask))
        self._ask(side, frame, [], waits)

    def _ask(
        self,
        side: _Side,
        frame: wire.MemoryMap | wire.MemoryQuarantine,
        fds: list[int],
        waits: _Await,
    ) -> None:
        if side.connection is None:  # it ends, or `every_second` sees to it
            return
        side.awaited[int(frame.id)] = waits
        if side.due_ns is None:
            side.due_ns = self._owner.now_ns() + ANSWER_TIMEOUT_NS
        side.connection.send(frame, fds)

    def _on_done(self, side: _Side, number: int, result: int) -> None:
        waits = side.awaited.pop(number, None)
        if waits is None:
            return  # too late: it was refused or killed for it
        side.due_ns = self._owner.now_ns() + ANSWER_TIMEOUT_NS if side.awaited else None
        if result:
            self._fail(side, f"libcuda refused to remap its memory with CUDA error {result}")
        else:
            self._tell(side, waits.granted)
            if waits.returned and side.process.memory is not None:
                self._owner.returned(side.process.memory.holder, waits.returned)
            if waits.then is not None:
                waits.then()
        if not side.arena.offline:
            self._move(side)  # the rest of a large grant
        self._end_hold()

    def _fail(self, side: _Side, why: str) -> None:
        """It did not do what it was asked to. Online goes on with what it has (P5), and may still answer."""
        if side.process.memory is None:
            self._refuse(side, why)
        elif side.arena.offline:
            self._kill(side, why)
        else:
            self._owner.emit_for(side.process, "grant-failed", level="error", why=why)

    def _kill(self, side: _Side, why: str) -> None:
        """Nothing of it waits any more."""
        side.granting = side.returning = 0
        side.awaited.clear()
        side.due_ns = None
        self._owner.kill_process(side.process, why)

    def _end_hold(self) -> None:
        """Release the hold once nothing waits for it any more."""
        awaited = (waits for side in self._sides.values() for waits in side.awaited.values())
        if not self._holding or any(waits.ends_hold for waits in awaited):
            return
        if waiting := self._waiting():
            for side in waiting:
                self._move(side)
            self._end_hold()
            return
        self._holding = False
        self._owner.release()

    # Ends -------------------------------------------------------------------------------------------

    def _side_of(self, connection: Connection) -> _Side | None:
        return next((s for s in self._sides.values() if s.connection is connection), None)

    def _deny(self, process: Process, connection: Connection, why: str) -> None:
        self._owner.emit_for(process, "denied", level="warning", why=why)
        connection.send(wire.Denied(code=RejectCode.EARENA, text=why.encode()[: wire.TEXT_BYTES - 1]))

    def _refuse(self, side: _Side, why: str) -> None:
        if side.connection is not None:
            self._deny(side.process, side.connection, why)
        self._drop(side)

    def _drop(self, side: _Side) -> None:
        """Forget an arena that never began to be used."""
        self._sides.pop(side.process.pid, None)
        self._close_arena(side)

    def _close_arena(self, side: _Side) -> None:
        for fd in side.uvm_fds or []:
            os.close(fd)
        side.uvm_fds = None
        self.memory.close(side.arena)
