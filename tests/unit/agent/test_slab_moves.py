# SPDX-License-Identifier: Apache-2.0
"""Moving slabs where the agent maps them itself: no slab is in two tenants, none gets lost, online lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from valve_agent import slab_moves, wire
from valve_agent.connection import Connection, Kind
from valve_agent.devices.base import DeviceError, OutOfDeviceMemory
from valve_agent.devices.nvidia.memory import NvidiaArena, NvidiaMemoryPool
from valve_agent.devices.nvidia.physical import Slab
from valve_agent.pool import ANSWER_TIMEOUT_NS, Holder
from valve_agent.registry import Memory, Process, Tenant
from valve_agent.slab_moves import ENDING_NS, MAPS_MAX, SlabMoves
from valve_agent.wire import MemoryRoute, Role, bits

UNUSED: Any = None
PID = 77
SLABS = 4096
BY_AGENT, BY_TENANT = MemoryRoute.BY_AGENT, MemoryRoute.BY_TENANT


class Driver:
    """What the pool needs of PhysicalSlabs and Mapper; `room` slabs exist, map `bad_map` and exports fail."""

    slab_bytes, granularity, free = 2 << 20, 2 << 20, 0

    def __init__(self) -> None:
        self.room, self.bad_map, self.bad_export = SLABS, 0, 0
        self.taken = self.maps = self.exports = 0
        self.back: list[int] = []
        self.opened: list[int] = []

    def take(self) -> Slab:
        if self.taken - len(self.back) >= self.room:
            raise OutOfDeviceMemory("no memory left")
        self.taken += 1
        return Slab(self.taken, self.taken, self.taken, 0)

    def give(self, slabs: list[Slab]) -> None:
        self.back += [slab.number for slab in slabs]

    def export(self, slab: Slab) -> int:
        self.exports += 1
        if self.exports == self.bad_export:
            raise DeviceError("cuMemExportToShareableHandle: CUDA_ERROR_UNKNOWN (999)")
        self.opened.append(os.open("/dev/null", os.O_RDONLY))
        return self.opened[-1]

    def map(self, *_: int) -> None:
        self.maps += 1
        if self.maps == self.bad_map:
            raise DeviceError("busy")

    def fill(self, count: int) -> int:
        return 0


class World:
    """One process with an arena, a pool that only remembers, and the process's end of its connection."""

    def __init__(self, role: Role, route: MemoryRoute) -> None:
        self.now = 1
        self.standing = 0
        self.asked = 0
        self.said: list[tuple[str, Any]] = []
        self.driver = Driver()
        physical: Any = self.driver
        self.memory = NvidiaMemoryPool(
            physical, physical, SLABS, b"g" * 16, lambda: self.standing > 0, routes=(route,)
        )
        owner: Any = self
        self.moves = SlabMoves(self.memory, UNUSED, owner)
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.theirs.setblocking(False)
        self.connection = Connection(1, ours, UNUSED, 0, lambda wanted: None)
        self.connection.kind = Kind.MEMORY
        self.arena = NvidiaArena(SLABS, Slab(0, 0, 0, 0), -1, role == Role.OFFLINE)
        self.arena.route, self.arena.base = route, 1 << 40
        self.holder = Holder(1, 1, "t", role, SLABS, SLABS)
        self.process = Process(PID, -1, Tenant(1, "t", role, SLABS, 2, -1, 1), "engine")
        self.process.memory = Memory(self.arena, -1, UNUSED, self.holder)
        self.side = slab_moves._Side(self.process, self.connection, self.arena, ready=True)
        self.moves._sides[PID] = self.side

    def close(self) -> None:
        self.connection.clear()
        self.connection.sock.close()
        self.theirs.close()

    # What the moves need of agent.py

    def hold_for_moves(self) -> None:
        self.asked += 1

    def release(self) -> None:
        self.standing -= 1

    def returned(self, holder: Holder, mask: int) -> None:
        """As the pool does it: whoever holds nothing there returns nothing."""
        mask &= holder.held
        self.said.append(("returned", mask))
        self.moves.forget(self.process, mask)
        self.memory.discard(self.arena, bits(mask))
        holder.held &= ~mask

    def send_to(self, process: Process, frame: Any) -> None:
        self.said.append((frame.TYPE.name, int(frame.set)))

    def kill_process(self, process: Process, why: str) -> None:
        self.said.append(("kill", why))

    def emit_for(self, process: Process, event: str, *, level: str = "info", **fields: object) -> None:
        self.said.append((event, fields.get("why")))

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None:
        self.said.append((event, fields.get("why")))

    def now_ns(self) -> int:
        return self.now

    # What happens

    def grant(self, mask: int) -> None:
        self.holder.held |= mask
        self.moves.grant(self.process, mask)

    def hold(self) -> None:
        self.asked -= 1
        self.standing += 1
        self.moves.on_held(True, "")

    def later(self, ns: int) -> None:
        self.now += ns
        self.moves.tick(self.now)

    def asks(self) -> list[tuple[str, int, list[int]]]:
        """(type, id, slabs) of what has come to the process."""
        found = []
        self.connection.flush()
        while True:
            try:
                frame, fds = wire.recv(self.theirs)
            except BlockingIOError:
                return found
            for fd in fds:
                os.close(fd)
            self.connection.flush()
            if isinstance(frame, wire.MemoryMap):
                found.append(("MAP", int(frame.id), list(frame.slab)[: frame.count]))
            elif isinstance(frame, wire.MemoryQuarantine):
                found.append(("QUARANTINE", int(frame.id), list(bits(int(frame.set)))))

    def done(self, number: int, result: int = 0) -> None:
        self.moves.on_frame(self.connection, wire.MemoryDone(id=number, result=result), [])

    def works(self) -> list[tuple[str, list[int]]]:
        """The process does all that it is asked to: (type, slabs) of each."""
        done = []
        while asks := self.asks():
            for what, number, slabs in asks:
                done.append((what, slabs))
                self.done(number)
        return done

    def names(self) -> list[str]:
        return [name for name, _ in self.said]

    def told(self) -> int:
        """All that the runtime was granted."""
        mask = 0
        for name, value in self.said:
            mask |= value if name == "GRANT" else 0
        return mask


@pytest.fixture
def new() -> Iterator[Callable[[Role, MemoryRoute], World]]:
    worlds: list[World] = []

    def make(role: Role, route: MemoryRoute) -> World:
        worlds.append(World(role, route))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


New = Callable[[Role, MemoryRoute], World]

# Requests to a process that maps -----------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.ONLINE, Role.OFFLINE])
def test_a_grant_of_any_size_reaches_a_process_that_is_slow_to_begin(new: New, role: Role) -> None:
    """More than the connection would take at once."""
    world = new(role, BY_TENANT)
    everything = (1 << SLABS) - 1
    world.grant(everything)
    if role == Role.OFFLINE:
        world.hold()
    assert len(world.side.awaited) * wire.MEMORY_BATCH == MAPS_MAX
    asked = world.works()
    assert sorted(slab for _, slabs in asked for slab in slabs) == list(range(SLABS))
    assert world.told() == everything
    assert (world.connection.overflowed, world.standing) == (False, 0)


@pytest.mark.parametrize("end", ["in time", "too late", "gone"])
def test_no_descriptor_of_a_request_outlives_it(new: New, end: str) -> None:
    """Nor is closed a second time, when the number may be somebody else's."""
    world = new(Role.OFFLINE, BY_TENANT)
    world.grant(0b111)
    world.hold()
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    assert others == world.driver.opened, "they were closed when they were sent"
    if end == "in time":
        world.works()
    elif end == "too late":
        world.later(ANSWER_TIMEOUT_NS)
    else:
        world.moves.gone(world.process)
    for fd in others:
        os.close(fd)


@pytest.mark.parametrize("role", [Role.ONLINE, Role.OFFLINE])
def test_time_runs_from_the_last_answer(new: New, role: Role) -> None:
    """A process that works off many requests is not slow."""
    world = new(role, BY_TENANT)
    world.grant((1 << 30) - 1)
    if role == Role.OFFLINE:
        world.hold()
    for _, number, _ in world.asks():
        world.later(ANSWER_TIMEOUT_NS - 1)
        world.done(number)
    assert set(world.names()) == {"GRANT"}
    assert world.told() == (1 << 30) - 1


def test_offline_that_does_not_answer_is_killed_once_and_nobody_waits_for_it(new: New) -> None:
    world = new(Role.OFFLINE, BY_TENANT)
    world.grant((1 << 300) - 1)
    world.hold()
    world.later(ANSWER_TIMEOUT_NS)
    assert world.said == [("kill", "it did not map granted memory in time")]
    assert (world.standing, world.moves.deadline_ns()) == (0, None)
    (_, number, _), *_ = world.asks()
    world.done(number)
    assert world.told() == 0, "an answer after the end is none"


def test_online_that_does_not_answer_lives_and_may_answer_later(new: New) -> None:
    world = new(Role.ONLINE, BY_TENANT)
    world.grant(0b1111)
    world.later(ANSWER_TIMEOUT_NS)
    assert world.said == [("grant-failed", "it did not map granted memory in time")]
    world.later(ANSWER_TIMEOUT_NS)
    assert world.moves.deadline_ns() is None, "it is said once"
    world.works()
    assert world.told() == 0b1111


@pytest.mark.parametrize(("role", "event"), [(Role.ONLINE, "grant-failed"), (Role.OFFLINE, "kill")])
def test_a_refusal_of_libcuda(new: New, role: Role, event: str) -> None:
    world = new(role, BY_TENANT)
    world.grant(0b1)
    if role == Role.OFFLINE:
        world.hold()
    ((_, number, _),) = world.asks()
    world.done(number, 2)
    assert world.said == [(event, "libcuda refused to remap its memory with CUDA error 2")]
    assert world.standing == 0


def test_a_process_answers_for_itself_only(new: New) -> None:
    """Requests are numbered for all processes together."""
    world = new(Role.OFFLINE, BY_TENANT)
    sock, _peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other = Connection(2, sock, UNUSED, 0, lambda wanted: None)
    process: Any = SimpleNamespace(pid=PID + 1, memory=world.process.memory)
    world.moves._sides[PID + 1] = slab_moves._Side(process, other, world.arena, ready=True)
    world.grant(0b1)
    world.hold()
    ((_, number, _),) = world.asks()
    world.moves.on_frame(other, wire.MemoryDone(id=number, result=0), [])
    assert (world.told(), world.standing) == (0, 1)
    sock.close()
    _peer.close()


# A process that comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [BY_AGENT, BY_TENANT])
def test_a_grant_that_waits_for_a_hold_when_the_process_comes_back(new: New, route: MemoryRoute) -> None:
    """The runtime claims nothing of it, so the pool gets it back, and nobody maps it."""
    world = new(Role.OFFLINE, route)
    world.grant(0b1)
    world.moves.give_back(world.process, 0b1)
    world.hold()
    assert [what for what, _ in world.works()] == ([] if route == BY_AGENT else ["QUARANTINE"])
    assert world.said == [("returned", 0b1)]
    assert (world.driver.taken, world.arena.held, world.standing) == (0, {}, 0)


@pytest.mark.parametrize("role", [Role.ONLINE, Role.OFFLINE])
def test_a_request_to_map_that_is_under_way_when_the_process_comes_back(new: New, role: Role) -> None:
    world = new(role, BY_TENANT)
    world.grant(0b111)
    if role == Role.OFFLINE:
        world.hold()
    world.moves.give_back(world.process, 0b101)
    assert world.works() == [("MAP", [0, 1, 2]), ("QUARANTINE", [0, 2])]
    assert world.said == [("GRANT", 0b010), ("returned", 0b101)]
    assert (list(world.arena.held), len(world.driver.back), world.standing) == ([1], 2, 0)


def test_what_is_given_back_twice_is_taken_once(new: New) -> None:
    """A return and the connection that is lost behind it: in between the slab may be granted again."""
    world = new(Role.ONLINE, BY_TENANT)
    world.grant(0b1)
    world.works()
    world.moves.give_back(world.process, 0b1)
    world.moves.give_back(world.process, 0b1)
    ((_, number, _),) = world.asks()
    world.done(number)
    world.grant(0b1)
    world.works()
    assert world.said == [("GRANT", 0b1), ("returned", 0b1), ("GRANT", 0b1)]
    assert list(world.arena.held) == [0]


@pytest.mark.parametrize("route", [BY_AGENT, BY_TENANT])
def test_a_reclaim_of_what_was_not_granted_yet(new: New, route: MemoryRoute) -> None:
    """Its grant must not reach the runtime after its loss."""
    world = new(Role.OFFLINE, route)
    world.grant(0b11)
    world.standing += 1
    frame = wire.Reclaim(id=1, set=wire.Bitmap.from_int(0b01))
    world.moves.reclaim(world.process, frame)
    world.hold()
    world.works()
    assert sorted(world.said) == [("GRANT", 0b10), ("RECLAIM", 0b01)]


# What the driver refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [1, 2, 5])
def test_a_slab_that_cannot_be_exported_is_not_lost_for_online(new: New, bad: int) -> None:
    world = new(Role.ONLINE, BY_TENANT)
    world.driver.bad_export = bad
    world.grant(0b11_1111)
    sent = 0b111 if bad == 5 else 0
    assert world.said == [("grant-failed", "cuMemExportToShareableHandle: CUDA_ERROR_UNKNOWN (999)")]
    world.works()
    assert world.told() == sent
    world.moves.every_second()
    assert world.said[-1] == ("returned", 0b11_1111 & ~sent)
    assert sum(1 << index for index in world.arena.held) == world.holder.held == sent
    for fd in world.driver.opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_slab_that_cannot_be_exported_ends_offline(new: New) -> None:
    world = new(Role.OFFLINE, BY_TENANT)
    world.driver.bad_export = 1
    world.grant((1 << 300) - 1)
    world.hold()
    assert world.names() == ["kill"]
    assert world.standing == 0


@pytest.mark.parametrize(
    ("what", "room", "bad_map", "told"),
    [
        ("half of it is there", 2, 0, 0b0011),
        ("the third cannot be mapped", SLABS, 3, 0b0011),
        ("nothing is there", 0, 0, 0),
        ("the first cannot be mapped", SLABS, 1, 0),
    ],
)
def test_what_online_could_not_be_given_returns_to_the_pool(
    new: New, what: str, room: int, bad_map: int, told: int
) -> None:
    world = new(Role.ONLINE, BY_AGENT)
    world.driver.room, world.driver.bad_map = room, bad_map
    world.grant(0b1111)
    assert world.told() == told
    assert set(world.names()) - {"GRANT"} == {"grant-failed"}, "nothing returns while the pool grants"
    world.moves.every_second()
    assert world.said[-1] == ("returned", 0b1111 & ~told)
    assert world.holder.held == told
    before = len(world.said)
    world.moves.every_second()
    assert len(world.said) == before, "once"


def test_what_could_not_be_given_is_not_taken_after_it_was_given(new: New) -> None:
    """The pool reclaimed it and granted it again in between."""
    world = new(Role.OFFLINE, BY_AGENT)
    world.driver.room = 1
    world.grant(0b11)
    world.hold()
    world.holder.held &= ~0b10
    world.moves.forget(world.process, 0b10)
    world.driver.room = 2
    world.grant(0b10)
    world.hold()
    world.moves.every_second()
    assert world.holder.held == world.told() == 0b11
    assert list(world.arena.held) == [0, 1]


def test_what_could_not_be_given_returns_one_way_only(new: New) -> None:
    """The process came back meanwhile, and claims nothing of it."""
    world = new(Role.ONLINE, BY_TENANT)
    world.driver.room = 1
    world.grant(0b11)
    world.works()
    world.moves.give_back(world.process, 0b10)
    world.moves.every_second()
    assert "returned" not in world.names(), "quarantine does not lie there yet"
    world.works()
    assert world.said[-1] == ("returned", 0b10)


@pytest.mark.parametrize("room", [0, 2])
def test_offline_lives_where_the_gpu_has_too_little(new: New, room: int) -> None:
    world = new(Role.OFFLINE, BY_AGENT)
    world.driver.room = room
    world.grant(0b1111)
    world.hold()
    world.moves.every_second()
    assert world.holder.held == world.told() == (1 << room) - 1
    assert set(world.names()) - {"GRANT"} == {"grant-failed", "returned"}


def test_offline_whose_memory_cannot_be_mapped_is_killed(new: New) -> None:
    world = new(Role.OFFLINE, BY_AGENT)
    world.driver.bad_map = 1
    world.grant(0b11)
    world.hold()
    assert world.said == [("kill", "memory cannot be granted to it: slab 0 cannot be mapped: busy")]


# The end of a process ---------------------------------------------------------------------------------------


def test_a_process_that_ends_is_not_killed_for_closing_its_connection(new: New) -> None:
    world = new(Role.OFFLINE, BY_TENANT)
    world.grant((1 << 300) - 1)
    world.hold()
    world.moves.on_closed(world.connection)
    assert world.standing == 0, "nobody waits for it"
    world.later(ANSWER_TIMEOUT_NS)
    world.moves.every_second()
    world.moves.gone(world.process)
    world.later(ENDING_NS)
    world.moves.every_second()
    assert set(world.names()) == {"returned"}


@pytest.mark.parametrize(("role", "event"), [(Role.ONLINE, "grant-failed"), (Role.OFFLINE, "kill")])
def test_a_process_that_goes_on_without_its_connection(new: New, role: Role, event: str) -> None:
    world = new(role, BY_TENANT)
    world.moves.on_closed(world.connection)
    world.grant(0b1)
    if role == Role.OFFLINE:
        world.hold()
    world.now += ENDING_NS
    for _ in range(2):
        world.moves.every_second()
    why = "its memory thread is gone: its memory cannot be taken back"
    assert world.said == [(event, why), ("returned", 0b1)]


def test_a_process_that_is_remapped_by_the_agent_needs_no_connection(new: New) -> None:
    world = new(Role.OFFLINE, BY_AGENT)
    world.grant(0b1)
    world.moves.on_closed(world.connection)
    world.now += ENDING_NS
    world.moves.every_second()
    world.hold()
    assert world.said == [("GRANT", 0b1)]
