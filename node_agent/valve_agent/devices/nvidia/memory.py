# SPDX-License-Identifier: Apache-2.0
"""Device memory of a GPU: the agent's slabs, mapped into tenants and taken away again.

Why it exists: a tenant's arena is address space in its own CUDA context, every slab of it on a quarantine
allocation of its own from the first moment. Granting a slab maps one of the agent's there; taking it maps the
quarantine there again. Neither is atomic on a GPU (old pages go before new ones come), so nothing of an
offline process may execute meanwhile: a remap without a standing hold is refused, whoever asks.

Two routes, tried in this order when an arena is opened:
    BY_AGENT    on the tenant's UVM file, below libcuda (uvm.py): works on a stopped or hung tenant
    BY_TENANT   a thread of libvalve calls libcuda, told by slab_moves.py; where UVM takes nothing from us

Threading model: the server thread; every call is a few ioctls. Callers: slab_moves.py, agent.py, main.py.

    ArenaError
    └── NotEvicted         the process may execute on the GPU: pause it first
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from valve_agent.devices.base import ArenaError, DeviceError, OutOfDeviceMemory
from valve_agent.devices.nvidia.physical import ADOPTED, PhysicalSlabs, Slab
from valve_agent.devices.nvidia.uvm import Mapper
from valve_agent.wire import SLABS_MAX, MemoryRoute

ADDRESS_BITS = 57
"""Of the widest address space that a GPU has."""


class NotEvicted(ArenaError):
    pass


class NvidiaArena:
    """The arena of one tenant process. Owns its descriptors once it is attached."""

    def __init__(self, slabs: int, quarantine: Slab | None, quarantine_fd: int, offline: bool) -> None:
        self.slabs = slabs
        self.memory_fd = -1
        """the process's UVM file"""
        self.quarantine_fd = quarantine_fd
        """the quarantine allocation, exported"""
        self.quarantine = quarantine
        """None: an earlier agent made it and its handle is gone"""
        self.quarantine_bytes = 0
        self.base = 0
        self.offline = offline
        self.route = MemoryRoute.BY_AGENT
        self.held: dict[int, Slab | None] = {}
        """slab of the arena -> what lies there; None: memory that an earlier agent made"""
        self.gone = False
        """its address space no longer exists: there is nothing to remap"""


class NvidiaMemoryPool:
    """The memory of one GPU."""

    huge_pages = True
    why_small_pages: str | None = None

    def __init__(
        self,
        physical: PhysicalSlabs,
        mapper: Mapper,
        slabs: int,
        gpu: bytes,
        hold_stands: Callable[[], bool],
        *,
        routes: tuple[MemoryRoute, ...] = (MemoryRoute.BY_AGENT, MemoryRoute.BY_TENANT),
    ) -> None:
        """`slabs`: most that tenants hold together. `hold_stands`: offline is paused and evicted, and stays
        so until somebody releases it."""
        self.slab_bytes = physical.slab_bytes
        self.slabs = slabs
        self.gpu = gpu
        self.orphans = 0
        """slabs in use whose handles an earlier agent had"""
        self._physical = physical
        self._mapper = mapper
        self._hold_stands = hold_stands
        self._routes = routes
        self._in_use = 0

    @property
    def ready(self) -> int:
        """Slabs that can be granted without being made first."""
        return self._physical.free

    def fill(self, most: int = SLABS_MAX) -> int:
        """Make slabs that nobody has yet, ahead of need, at most `most` of them: how many are ready."""
        wanted = self.slabs - self._in_use - self.orphans
        return self._physical.fill(min(wanted, self._physical.free + most))

    # Arenas -----------------------------------------------------------------------------------------

    def prepare(self, slabs: int, offline: bool) -> NvidiaArena:
        """An arena before its process has reserved the address space: quarantine, and its descriptor.
        Raises ArenaError."""
        if not 0 < slabs <= SLABS_MAX:
            raise OutOfDeviceMemory(f"an arena has 1..{SLABS_MAX} slabs, not {slabs}")
        quarantine = self._physical.take()
        try:
            fd = self._physical.export(quarantine)
        except DeviceError:
            self._physical.give([quarantine])
            raise
        arena = NvidiaArena(slabs, quarantine, fd, offline)
        arena.quarantine_bytes = self.slab_bytes
        return arena

    def attach(self, arena: NvidiaArena, base: int, uvm_fds: list[int]) -> None:
        """The process has reserved [base, ...) and maps quarantine everywhere. Finds its UVM file among
        `uvm_fds` and the route that works; takes the descriptors over. Raises ArenaError, and then owns
        none."""
        self._require_hold(arena)
        self._check_place(arena, base)
        refusals: list[str] = []
        arena.base = base
        if MemoryRoute.BY_AGENT in self._routes:
            for fd in uvm_fds:
                try:
                    self._mapper.map(fd, base, self.slab_bytes, _memory(arena.quarantine))
                except DeviceError as error:
                    refusals.append(str(error))
                    continue
                arena.memory_fd = fd
                break
        else:
            refusals.append("route BY_AGENT is switched off")
        if arena.memory_fd < 0 and MemoryRoute.BY_TENANT not in self._routes:
            raise ArenaError(f"no route to the memory of this process: {'; '.join(refusals)}")
        if arena.memory_fd < 0:
            arena.route = MemoryRoute.BY_TENANT
            arena.memory_fd = uvm_fds[0]
        for fd in uvm_fds:
            if fd != arena.memory_fd:
                os.close(fd)

    def create(self, slabs: int) -> NvidiaArena:
        """On a GPU an arena begins in its process: see `prepare`."""
        raise ArenaError(
            "this runtime asked for an arena without reserving GPU memory first: update libvalve in the pod"
        )

    def restore(self, memory_fd: int, quarantine_fd: int, slabs: int) -> NvidiaArena:
        """The arena that a process kept over an agent's restart; `adopt` follows."""
        if not 0 < slabs <= SLABS_MAX:
            raise ArenaError(f"an arena has 1..{SLABS_MAX} slabs, not {slabs}")
        arena = NvidiaArena(slabs, None, quarantine_fd, offline=True)
        arena.memory_fd = memory_fd
        arena.quarantine_bytes = self.slab_bytes
        return arena

    def adopt(self, arena: NvidiaArena, base: int, held: Iterable[int], offline: bool) -> None:
        """What the process says that it holds. The memory lives by its mappings; its handles died with the
        agent that made them, so it returns to the GPU when it is taken, and is made anew. Raises
        ArenaError."""
        self._check_place(arena, base)
        arena.base, arena.offline = base, offline
        arena.held = dict.fromkeys(held)
        try:
            arena.quarantine = self._physical.adopt(arena.quarantine_fd)
        except DeviceError:
            arena.quarantine = None  # sparse pages will do
        self.orphans += len(arena.held)

    # Moving memory ----------------------------------------------------------------------------------

    def grant(self, arena: NvidiaArena, slabs: Iterable[int]) -> list[int]:
        """Zeroed memory lies at these slabs of the arena on return; those that it could be given, in order.
        Raises NotEvicted; DeviceError when nothing could be given: OutOfDeviceMemory if the arena is as it
        was."""
        self._require_hold(arena)
        given: list[int] = []
        for index in slabs:
            try:
                slab = self._fresh(arena, index)
            except DeviceError:
                if given:
                    break
                raise
            arena.held[index] = slab
            self._in_use += 1
            given.append(index)
        return given

    def export(self, arena: NvidiaArena, index: int) -> int:
        """Route BY_TENANT: a descriptor of what should lie at slab `index`; the caller's to close."""
        slab = arena.held[index]
        assert slab is not None
        return self._physical.export(slab)

    def discard(self, arena: NvidiaArena, slabs: Iterable[int]) -> None:
        """Quarantine lies at these slabs on return, and their memory is zero and free. Slabs at which nothing
        lies are left out. Raises NotEvicted; ArenaError, after which the process must not run again."""
        taken = [index for index in slabs if index in arena.held]
        if not taken:
            return
        if not arena.gone:
            self._require_hold(arena)
            if arena.route == MemoryRoute.BY_AGENT:
                for index in taken:
                    self._quarantine(arena, index)
        back = [slab for index in taken if (slab := arena.held.pop(index)) is not None]
        self.orphans -= len(taken) - len(back)
        self._in_use -= len(back)
        self._physical.give(back)

    def gone(self, arena: NvidiaArena) -> None:
        """The process, or the address space with the arena in it, exists no more."""
        arena.gone = True

    def resident_bytes(self, arena: NvidiaArena) -> int:
        """Only the agent populates an arena, so this is what was granted."""
        return len(arena.held) * self.slab_bytes

    def close(self, arena: NvidiaArena) -> None:
        """`discard` came before. The agent's descriptors hold the process's files open: closed at once."""
        if arena.quarantine is not None:
            if arena.quarantine.number == ADOPTED:
                # A lost GPU refuses. The driver frees it with the agent's client, when the agent ends.
                with contextlib.suppress(DeviceError):
                    self._physical.forget(arena.quarantine)
            else:
                self._physical.give([arena.quarantine])
            arena.quarantine = None
        for fd in (arena.memory_fd, arena.quarantine_fd):
            if fd >= 0:
                os.close(fd)
        arena.memory_fd = arena.quarantine_fd = -1

    def shut_down(self) -> None:
        """The agent ends. What tenants have mapped lives on in them."""
        self._physical.close()

    def _fresh(self, arena: NvidiaArena, index: int) -> Slab:
        """A slab, which on route BY_AGENT lies at `index` on return. Raises DeviceError."""
        slab = self._physical.take()
        try:
            if arena.route == MemoryRoute.BY_AGENT:
                self._map(arena, index, slab)
        except DeviceError as error:
            self._physical.give([slab])
            raise ArenaError(f"slab {index} cannot be mapped: {error}") from error
        return slab

    def _check_place(self, arena: NvidiaArena, base: int) -> None:
        """The process says where its arena lies. Raises ArenaError."""
        unit = self._physical.granularity
        if base % unit:
            raise ArenaError(
                f"an arena at 0x{base:x} is not aligned to the {unit} bytes that this GPU maps at"
            )
        if base + arena.slabs * self.slab_bytes >= 1 << ADDRESS_BITS:
            raise ArenaError(
                f"an arena of {arena.slabs} slabs at 0x{base:x} is beyond what a GPU can address"
            )

    def _quarantine(self, arena: NvidiaArena, index: int) -> None:
        try:
            if arena.quarantine is None:
                self._mapper.sparse(arena.memory_fd, arena.base + index * self.slab_bytes, self.slab_bytes)
            else:
                self._map(arena, index, arena.quarantine)
        except DeviceError as error:
            raise ArenaError(f"slab {index} cannot be taken: {error}") from error

    def _map(self, arena: NvidiaArena, index: int, slab: Slab) -> None:
        base = arena.base + index * self.slab_bytes
        self._mapper.map(arena.memory_fd, base, self.slab_bytes, slab.memory)

    def _require_hold(self, arena: NvidiaArena) -> None:
        if arena.offline and not self._hold_stands():
            raise NotEvicted(
                "an offline process may execute on the GPU: its memory is remapped only while it is evicted"
            )


def _memory(slab: Slab | None) -> int:
    assert slab is not None
    return slab.memory
