# SPDX-License-Identifier: Apache-2.0
"""Who has which slabs of one device, who gets the free ones, and how offline memory is taken back.

Why it exists: the accounting must hold at every instant (granted slabs never exceed the device), online
must get free slabs at once, and a reclaim is a small dance with the gate and several processes that must
not block the server. So this is a state machine without I/O: time comes in as an argument, everything
that acts on the world goes out through `Effects`.

    settle       online wants are served from everything free, offline wants from free - reservation
    a shortfall  hold the gate -> read ledgers -> choose victims -> RECLAIM -> RECLAIMED (or kill)
                 -> discard the pages -> GRANT to online -> release the gate

One operation takes the shortfall and refills the reservation together (policy/reservation.py). A victim
that does not answer in time is killed: memory that cannot be accounted for is not shared (P6).

Threading model: the server thread only. Callers: server.py.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from valve_agent.policy.rate import RateMeter
from valve_agent.policy.reservation import Reservation
from valve_agent.policy.victims import Choice, SlabView, choose
from valve_agent.shared import LedgerCopy
from valve_agent.wire import Role, bits

HOLD_TIMEOUT_NS = 3_000_000_000
"""How long the gate may take to pause everybody; it kills what it cannot pause long before."""
ANSWER_TIMEOUT_NS = 250_000_000
"""How long a victim may take to remap: a thousand times what it needs, short for waiting online requests."""
RETRY_NS = 1_000_000_000
"""Pause between attempts when an operation could not get all it needed."""


@dataclass(eq=False, slots=True)
class Holder:
    """One process with an arena. Slab sets are integers: bit s is slab s of its own arena."""

    id: int
    tenant: int
    name: str
    role: Role
    slabs: int
    limit: int
    """Most slabs that all processes of its tenant may hold together."""
    held: int = 0
    want: int = 0
    attached: bool = True
    """A connection stands: it can be granted to and reclaimed from."""

    @property
    def count(self) -> int:
        return self.held.bit_count()


class Effects(Protocol):
    """What the pool makes happen; server.py does it. None of these may call back into the pool."""

    def hold(self) -> None:
        """Pause and evict offline; answered by `Pool.on_held`. Every hold that was answered with ok is
        released exactly once."""
        ...

    def release(self) -> None: ...

    def ledger(self, holder: Holder) -> LedgerCopy | None:
        """What its requests own; None if it cannot be read."""
        ...

    def reclaim(self, holder: Holder, operation: int, mask: int) -> None:
        """Ask it to remap; answered by `Pool.on_reclaimed`."""
        ...

    def discard(self, holder: Holder, mask: int) -> None:
        """The pages of these slabs return to the machine."""
        ...

    def grant(self, holder: Holder, mask: int) -> None: ...

    def kill(self, holder: Holder, why: str) -> None:
        """End the process; `Pool.detach` follows when it is gone."""
        ...

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None: ...


@dataclass(slots=True)
class _Operation:
    """A reclaim in flight."""

    id: int
    started_ns: int
    deadline_ns: int
    held_ns: int = 0
    sent_ns: int = 0
    remapped_ns: int = 0
    discarding_ns: int = 0
    """Time spent on giving pages back to the machine."""
    choice: Choice | None = None
    waiting: dict[int, int] = field(default_factory=dict)
    """holder id -> slabs that it was asked to remap"""
    taken: dict[int, int] = field(default_factory=dict)
    """holder id -> slabs that are back in the pool"""


@dataclass(slots=True)
class Totals:
    """Counters since the start of the agent."""

    reclaims: int = 0
    reclaimed_slabs: int = 0
    reclaimed_in_use_slabs: int = 0
    requests_harmed: int = 0
    killed: int = 0


class Pool:
    def __init__(
        self,
        *,
        slabs: int,
        slab_bytes: int,
        reservation: Reservation,
        max_reclaims_per_minute: int,
        effects: Effects,
        online_floor_slabs: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
        recover_until_ns: int = 0,
    ) -> None:
        """`online_floor_slabs`: offline together holds at most the rest. `max_reclaims_per_minute`: beyond it
        offline is granted nothing new. `recover_until_ns`: until then offline is granted nothing, for
        processes that hold slabs may not have reconnected yet."""
        self.slabs = slabs
        self.slab_bytes = slab_bytes
        self.reservation = reservation
        self.totals = Totals()
        self.holders: dict[int, Holder] = {}
        self.rate = RateMeter()
        self._rate_max = max_reclaims_per_minute
        self._growth_stopped = False
        self._floor = online_floor_slabs
        self._effects = effects
        self._clock = clock
        self._recover_until_ns = recover_until_ns
        self._operation: _Operation | None = None
        self._operations = 0
        self._retry_ns = 0
        self._reported: tuple[int, int, dict[str, int]] | None = None

    # What stands ------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Slabs that nobody holds; below zero for a moment after a restart, when processes bring back more
        than is left."""
        return self.slabs - sum(holder.count for holder in self.holders.values())

    @property
    def growth_stopped(self) -> bool:
        """Offline gets nothing new: too many reclaims in the last minute."""
        return self._growth_stopped

    @property
    def reclaiming(self) -> bool:
        return self._operation is not None

    def room(self, holder: Holder) -> int:
        """How many slabs more it would take now: bounded by its want, its arena and its tenant's limit."""
        return max(0, min(min(holder.want, holder.slabs) - holder.count, self._tenant_room(holder)))

    def _tenant_room(self, holder: Holder) -> int:
        return holder.limit - sum(h.count for h in self.holders.values() if h.tenant == holder.tenant)

    def held_by_tenant(self) -> dict[str, int]:
        held: dict[str, int] = {}
        for holder in self.holders.values():
            held[holder.name] = held.get(holder.name, 0) + holder.count
        return held

    def deadline_ns(self) -> int | None:
        """When `tick` must run at the latest; None: nothing is waiting for time."""
        times = [self.reservation.deadline_ns()]
        if self._operation:
            times.append(self._operation.deadline_ns)
        elif self._shortfall() > 0 and self._retry_ns:
            times.append(self._retry_ns)
        if self._recover_until_ns:
            times.append(self._recover_until_ns)
        return min((time for time in times if time is not None), default=None)

    def change(self, *, max_reclaims_per_minute: int, online_floor_slabs: int) -> None:
        """Other limits from now on; what offline holds above them stays until it is reclaimed or returned."""
        self._rate_max = max_reclaims_per_minute
        self._floor = online_floor_slabs

    # What happens -----------------------------------------------------------------------------------

    def attach(self, holder: Holder) -> None:
        """A process has an arena (new, or restored with what it holds)."""
        self.holders[holder.id] = holder
        self.settle()

    def detach(self, holder: Holder) -> None:
        """The process is gone, and its memory with it."""
        if self.holders.pop(holder.id, None) is None:
            return
        self._answered(holder)
        self.settle()

    def disconnected(self, holder: Holder) -> None:
        """The connection is lost but the process lives: it keeps what it holds, and gets nothing."""
        holder.attached = False
        holder.want = 0

    def on_want(self, holder: Holder, total: int) -> None:
        holder.want = total
        self.settle()

    def on_return(self, holder: Holder, mask: int) -> None:
        """It remapped these slabs and gives them back, so it wants as many less: a RETURN may come before the
        lower WANT. Slabs that it does not hold are left out: a RETURN may cross a RECLAIM of the same."""
        mask &= holder.held
        if mask:
            self._effects.discard(holder, mask)
            holder.held &= ~mask
            holder.want = max(0, holder.want - mask.bit_count())
            self._effects.emit("return", level="debug", tenant=holder.name, slabs=mask.bit_count())
            self.settle()

    def on_held(self, ok: bool, why: str) -> None:
        """The gate answers: offline is off the device until `release` (or not, and why)."""
        operation = self._operation
        if operation is None or operation.held_ns:
            if ok:
                self._effects.release()
            return
        if not ok:
            self._abandon(f"offline could not be paused: {why}")
            return
        operation.held_ns = self._clock()
        shortfall = self._shortfall()
        if shortfall <= 0:  # somebody gave enough back in the meantime
            self._finish(operation)
            return
        reservation = self._raise_reservation(shortfall)
        self._ask(operation, shortfall + reservation)

    def on_reclaimed(self, holder: Holder, operation_id: int, mask: int) -> None:
        """A victim remapped what it was asked to."""
        operation = self._operation
        if operation is None or operation.id != operation_id or holder.id not in operation.waiting:
            self._effects.emit(
                "reclaim-late",
                level="warning",
                tenant=holder.name,
                operation=operation_id,
                slabs=mask.bit_count(),
            )
            return
        if mask != operation.waiting[holder.id]:
            self._kill(holder, "it remapped other slabs than it was asked to")
            return
        operation.remapped_ns = self._clock()
        mask &= holder.held
        self._effects.discard(holder, mask)
        operation.discarding_ns += self._clock() - operation.remapped_ns
        holder.held &= ~mask
        operation.taken[holder.id] = mask
        self._answered(holder)

    def tick(self) -> None:
        """Let time pass. Call at `deadline_ns` or a little later."""
        now = self._clock()
        if self._recover_until_ns and now >= self._recover_until_ns:
            self._recover_until_ns = 0
        before = self.reservation.slabs
        if self.reservation.tick(now) != before:
            self._effects.emit("reservation", slabs=self.reservation.slabs, reason="quiet", level="debug")
        operation = self._operation
        if operation and now >= operation.deadline_ns:
            if not operation.held_ns:
                self._abandon("the gate did not answer")
            else:
                for holder_id in operation.waiting:
                    self._kill(self.holders[holder_id], "it did not give reclaimed memory back in time")
                self._finish(operation)
        self.settle()

    def settle(self) -> None:
        """Give out what can be given out now; start an operation if online still lacks something."""
        if self._operation is None:
            self._grant_online()
            shortfall = self._shortfall()
            if shortfall > 0:
                self._start(shortfall)
            elif self._offline_may_grow():
                self._grant_offline()
        self._report()

    # Grants -----------------------------------------------------------------------------------------

    def _shortfall(self) -> int:
        """Slabs that online wants above what is free."""
        online = (holder for holder in self.holders.values() if holder.role == Role.ONLINE)
        return sum(self.room(holder) for holder in online) - self.free

    def _grant_online(self) -> None:
        for holder in self.holders.values():
            if holder.role == Role.ONLINE:
                self._grant(holder, min(self.room(holder), max(0, self.free)))

    def _offline_may_grow(self) -> bool:
        now = self._clock()
        stopped = self.rate.recent(now) >= self._rate_max
        if stopped != self._growth_stopped:
            self._growth_stopped = stopped
            self._effects.emit("offline-growth", level="warning" if stopped else "info", stopped=stopped)
        return not stopped and now >= self._recover_until_ns

    def _grant_offline(self) -> None:
        """Fair shares: the next slab goes to whoever holds the fewest."""
        offline = sum(holder.count for holder in self.holders.values() if holder.role == Role.OFFLINE)
        spare = min(self.free - self.reservation.slabs, self.slabs - self._floor - offline)
        if spare <= 0:
            return
        waiting = [h for h in self.holders.values() if h.role == Role.OFFLINE and self.room(h)]
        room = {holder.id: self.room(holder) for holder in waiting}
        tenant_room = {holder.tenant: self._tenant_room(holder) for holder in waiting}
        shares = {holder.id: 0 for holder in waiting}
        heap = [(holder.count, holder.id) for holder in waiting]
        heapq.heapify(heap)
        while spare and heap:
            count, holder_id = heapq.heappop(heap)
            tenant = self.holders[holder_id].tenant
            if shares[holder_id] >= room[holder_id] or not tenant_room[tenant]:
                continue
            shares[holder_id] += 1
            tenant_room[tenant] -= 1
            spare -= 1
            heapq.heappush(heap, (count + 1, holder_id))
        for holder in waiting:
            self._grant(holder, shares[holder.id])

    def _grant(self, holder: Holder, count: int) -> None:
        """Grant the `count` lowest slabs of its arena that it does not hold."""
        if count <= 0:
            return
        mask = _lowest(~holder.held & ((1 << holder.slabs) - 1), count)
        holder.held |= mask
        self._effects.emit("grant", tenant=holder.name, slabs=count, level="debug")
        self._effects.grant(holder, mask)

    # Reclaim ----------------------------------------------------------------------------------------

    def _start(self, shortfall: int) -> None:
        now = self._clock()
        if now < self._retry_ns:
            return
        self._retry_ns = 0  # what is tried again now need not be waited for
        if not any(h.role == Role.OFFLINE and h.attached and h.held for h in self.holders.values()):
            return
        self._operations += 1
        self._operation = _Operation(self._operations, now, now + HOLD_TIMEOUT_NS)
        self._effects.hold()

    def _raise_reservation(self, shortfall: int) -> int:
        before = self.reservation.slabs
        after = self.reservation.on_shortfall(shortfall, self._clock())
        if after != before:
            self._effects.emit("reservation", slabs=after, reason="shortfall", level="debug")
        return after

    def _ask(self, operation: _Operation, need: int) -> None:
        views: list[SlabView] = []
        tokens: dict[int, tuple[int, ...]] = {}
        for holder in self.holders.values():
            if holder.role != Role.OFFLINE or not holder.attached or not holder.held:
                continue
            copy = self._effects.ledger(holder)
            if copy is None:
                self._kill(holder, "its ownership ledger cannot be read")
                continue
            tokens[holder.id] = copy.tokens
            owners, pinned = copy.owners, copy.pinned
            views += [
                SlabView(holder.id, slab, owners[slab], bool(pinned >> slab & 1))
                for slab in bits(holder.held)
            ]
        operation.choice = choose(views, need, tokens)
        now = self._clock()
        operation.sent_ns = now
        operation.deadline_ns = now + ANSWER_TIMEOUT_NS
        by_holder = operation.choice.by_tenant()
        operation.waiting = {holder_id: _mask(slabs) for holder_id, slabs in by_holder.items()}
        if not operation.waiting:
            self._retry_ns = now + RETRY_NS
            self._effects.emit(
                "reclaim-impossible",
                level="warning",
                slabs=need,
                why="offline holds nothing that is not pinned",
            )
            self._finish(operation)
            return
        for holder_id, mask in operation.waiting.items():
            self._effects.reclaim(self.holders[holder_id], operation.id, mask)

    def _answered(self, holder: Holder) -> None:
        """This holder's part of the operation is over (it answered, or it is gone)."""
        operation = self._operation
        if operation and operation.waiting.pop(holder.id, None) is not None and not operation.waiting:
            self._finish(operation)

    def _finish(self, operation: _Operation) -> None:
        self._operation = None
        self._grant_online()
        now = self._clock()
        self._effects.release()
        if self._shortfall() > 0:
            self._retry_ns = max(self._retry_ns, now + RETRY_NS)
        if not operation.taken or operation.choice is None:
            return
        taken = sum(mask.bit_count() for mask in operation.taken.values())
        in_use = sum(
            1
            for view in operation.choice.slabs
            if view.owners and operation.taken.get(view.tenant, 0) >> view.slab & 1
        )
        if in_use:
            self.rate.add(now)
        self.totals.reclaims += 1
        self.totals.reclaimed_slabs += taken
        self.totals.reclaimed_in_use_slabs += in_use
        self.totals.requests_harmed += len(operation.choice.harmed)
        self._effects.emit(
            "reclaim",
            slabs=taken,
            bytes=taken * self.slab_bytes,
            bytes_in_use=in_use * self.slab_bytes,
            victims=self._names(operation.taken),
            requests_harmed=len(operation.choice.harmed),
            tokens_to_recompute=operation.choice.tokens,
            duration_us=(now - operation.started_ns) // 1000,
            hold_us=(operation.held_ns - operation.started_ns) // 1000,
            choose_us=(operation.sent_ns - operation.held_ns) // 1000,
            remap_us=max(0, operation.remapped_ns - operation.sent_ns) // 1000,
            discard_us=operation.discarding_ns // 1000,
        )

    def _names(self, masks: Mapping[int, int]) -> dict[str, int]:
        names: dict[str, int] = {}
        for holder_id, mask in masks.items():
            holder = self.holders.get(holder_id)
            name = holder.name if holder else f"process {holder_id} (gone)"
            names[name] = names.get(name, 0) + mask.bit_count()
        return names

    def _abandon(self, why: str) -> None:
        self._operation = None
        self._retry_ns = self._clock() + RETRY_NS
        self._effects.emit("reclaim-failed", level="error", why=why)

    def _kill(self, holder: Holder, why: str) -> None:
        self.totals.killed += 1
        self._effects.kill(holder, why)

    def _report(self) -> None:
        state = (self.free, self.reservation.slabs, self.held_by_tenant())
        if state != self._reported:
            self._reported = state
            self._effects.emit("pool", level="debug", free=state[0], reservation=state[1], held=state[2])


def _mask(slabs: Iterable[int]) -> int:
    mask = 0
    for slab in slabs:
        mask |= 1 << slab
    return mask


def _lowest(mask: int, count: int) -> int:
    """The `count` lowest one bits of `mask`."""
    if mask.bit_count() <= count:
        return mask
    result = 0
    for _ in range(count):
        low = mask & -mask
        result |= low
        mask ^= low
    return result
