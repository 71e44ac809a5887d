# SPDX-License-Identifier: Apache-2.0
"""The arenas of one device's tenants: opened, brought back, given back, let go.

Why it exists: an arena is memory of the device, an ownership ledger and an account of the pool; the three are
made together and end together. A runtime asks for one (ARENA_OPEN) or comes back with one, after an agent's
restart or a lost connection (ARENA_RESTORE): then what it claims to hold is compared with what is known.

Threading model: the server thread. Caller: agent.py.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from valve_agent import wire
from valve_agent.connection import Connection
from valve_agent.devices.base import ArenaError, MemoryPool
from valve_agent.identity import IdentityError
from valve_agent.pool import Holder, Pool
from valve_agent.registry import Memory, Process
from valve_agent.shared import Ledger, LedgerCopy, SharedMemoryError, ledger_bytes
from valve_agent.slab_moves import SlabMoves
from valve_agent.wire import RejectCode, Role, bits


class Owner(Protocol):
    """What the arenas need of agent.py."""

    settings: Any
    pool: Pool
    moves: SlabMoves | None

    def arena_limit(self, process: Process) -> int: ...
    def kill_process(self, process: Process, why: str) -> None: ...
    def emit_for(self, process: Process, event: str, *, level: str = "info", **fields: object) -> None: ...


class Arenas:
    """`process_of` knows whose an account of the pool is."""

    def __init__(self, memory: MemoryPool[Any], owner: Owner) -> None:
        self._memory = memory
        self._owner = owner
        self._by_holder: dict[int, Process] = {}
        self._holders = 0

    def process_of(self, holder: Holder) -> Process:
        return self._by_holder[holder.id]

    def on_open(self, connection: Connection, process: Process, frame: wire.ArenaOpen) -> None:
        if process.memory is not None:
            raise wire.BadField("ARENA_OPEN came twice: a process has one arena")
        why_not = self._why_not(process, int(frame.slabs))
        if why_not:
            self._deny(connection, process, why_not)
            return
        moves = self._owner.moves
        try:
            arena = moves.claim(process) if moves else self._memory.create(int(frame.slabs))
        except ArenaError as error:
            self._deny(connection, process, str(error))
            return
        ledger_fd, ledger = Ledger.create(arena.slabs)
        self._add(process, arena, ledger_fd, ledger, held=0)
        connection.send(
            wire.Arena(
                slabs=arena.slabs, slab_bytes=self._owner.settings.slab_bytes,
                quarantine_bytes=arena.quarantine_bytes, ledger_bytes=ledger_bytes(arena.slabs),
            ),
            [arena.memory_fd, arena.quarantine_fd, ledger_fd],
        )  # fmt: skip

    def on_restore(self, process: Process, frame: wire.ArenaRestore, fds: list[int]) -> None:
        """A runtime comes back with its arena. Takes the descriptors. Raises IdentityError."""
        if process.memory is not None:
            for fd in fds:
                os.close(fd)
            self._reconcile(process, process.memory.holder, int(frame.held))
            return
        try:
            held, slabs = int(frame.held), int(frame.slabs)
            arena = self._memory.restore(fds[0], fds[1], slabs)
            if held >> slabs:
                raise ArenaError(f"slabs beyond the arena's {slabs}")
            if process.tenant.role == Role.OFFLINE and held.bit_count() > process.tenant.limit_slabs:
                raise ArenaError(f"{held.bit_count()} slabs where {process.tenant.limit_slabs} are allowed")
            ledger = Ledger(fds[2], slabs)
            if self._owner.moves is not None:
                self._owner.moves.adopt(process, arena, ledger.base, held)
        except (ArenaError, SharedMemoryError) as error:
            for fd in fds:
                os.close(fd)
            if process.tenant.role == Role.OFFLINE:
                self._owner.kill_process(process, f"its memory cannot be accounted for: {error}")
            raise IdentityError(RejectCode.EARENA, f"the arena cannot be restored: {error}") from error
        self._add(process, arena, fds[2], ledger, held)
        self._owner.emit_for(process, "restore", slabs=held.bit_count())

    def give_back(self, process: Process, mask: int) -> None:
        """The pool takes slabs back that their holder no longer uses; on a GPU once quarantine lies there."""
        assert process.memory is not None
        if self._owner.moves is not None:
            self._owner.moves.give_back(process, mask)
        else:
            self._owner.pool.on_return(process.memory.holder, mask)

    def ledger(self, holder: Holder) -> LedgerCopy | None:
        """None if its writer outpaces us."""
        memory = self._by_holder[holder.id].memory
        assert memory is not None
        try:
            return memory.ledger.read()
        except SharedMemoryError:
            return None

    def discard(self, holder: Holder, mask: int) -> None:
        """Nobody has these slabs mapped any more: their memory returns to the device."""
        process = self._by_holder[holder.id]
        assert process.memory is not None
        if self._owner.moves is not None:
            self._owner.moves.forget(process, mask)
        try:
            self._memory.discard(process.memory.arena, bits(mask))
        except ArenaError as error:
            if process.tenant.role == Role.OFFLINE:
                self._owner.kill_process(process, str(error))
            else:  # it never dies of Valve (P5); what lies there is nobody else's before it ends
                self._owner.emit_for(process, "discard-failed", level="error", why=str(error))

    def release(self, process: Process) -> None:
        """Its address space is gone: memory returns to the machine, then slabs to the pool."""
        memory = process.memory
        if self._owner.moves is not None:
            self._owner.moves.gone(process)
        if memory is None:
            return
        holder = memory.holder
        self.discard(holder, (1 << holder.slabs) - 1)
        process.memory = None
        del self._by_holder[holder.id]
        memory.ledger.close()
        os.close(memory.ledger_fd)
        self._memory.close(memory.arena)
        self._owner.pool.detach(holder)

    def _why_not(self, process: Process, slabs: int) -> str:
        """Why it may not have an arena of so many slabs; "" if it may."""
        tenant = process.tenant
        if process.others:
            return (
                f"{tenant.name} has {1 + len(process.others)} GPUs, and memory is lent on one at a time: its "
                "KV cache stays as it is"
            )
        most, each = self._owner.arena_limit(process), self._owner.settings.slab_bytes
        if 0 < slabs <= most:
            return ""
        fix = (
            "raise `valve run --memory` or give the engine less KV cache"
            if tenant.role == Role.OFFLINE
            else "give the engine less KV cache, or the policy's device more memory"
        )
        return (
            f"an arena of {slabs * each >> 20}Mi is more than the {most * each >> 20}Mi that tenant "
            f"{tenant.name} may have: {fix}"
        )

    def _deny(self, connection: Connection, process: Process, sentence: str) -> None:
        self._owner.emit_for(process, "denied", level="warning", why=sentence)
        connection.send(wire.Denied(code=RejectCode.EARENA, text=sentence.encode()[: wire.TEXT_BYTES - 1]))

    def _reconcile(self, process: Process, holder: Holder, claimed: int) -> None:
        """The agent knows what was granted. Less than that: a grant got lost, take it back. More: a lie."""
        if claimed & ~holder.held:
            self._owner.kill_process(process, "it claims slabs that it was not granted")
            return
        holder.attached = True
        self.give_back(process, holder.held & ~claimed)
        self._owner.emit_for(process, "restore", slabs=claimed.bit_count())

    def _add(self, process: Process, arena: Any, ledger_fd: int, ledger: Ledger, held: int) -> None:
        self._holders += 1
        tenant = process.tenant
        holder = Holder(
            self._holders, tenant.id, tenant.name, tenant.role, arena.slabs, tenant.limit_slabs, held
        )
        process.memory = Memory(arena, ledger_fd, ledger, holder)
        self._by_holder[holder.id] = process
        self._owner.pool.attach(holder)
