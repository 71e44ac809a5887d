# SPDX-License-Identifier: Apache-2.0
"""The memory of a GPU, as its pool behaves when the driver refuses and when a process lies."""

from __future__ import annotations

import os
from typing import Any

import pytest

from valve_agent.devices.base import ArenaError, DeviceError, OutOfDeviceMemory
from valve_agent.devices.nvidia.memory import NvidiaArena, NvidiaMemoryPool
from valve_agent.devices.nvidia.physical import ADOPTED, Slab

SLAB = 32 << 20
UNIT = 2 << 20


class Driver:
    """What the pool needs of PhysicalSlabs and Mapper. Refuses the calls of these numbers, from 1."""

    slab_bytes, granularity, free = SLAB, UNIT, 0

    def __init__(self, *, takes: int = 100, bad_maps: tuple[int, ...] = (), lost: bool = False) -> None:
        self.takes, self.bad_maps, self.lost = takes, bad_maps, lost
        self.taken = self.maps = 0
        self.given: list[Slab] = []

    def take(self) -> Slab:
        if self.taken == self.takes:
            raise OutOfDeviceMemory("no memory left")
        self.taken += 1
        return Slab(self.taken, self.taken, self.taken, 0)

    def give(self, slabs: list[Slab]) -> None:
        self.given += slabs

    def adopt(self, fd: int) -> Slab:
        return Slab(ADOPTED, 0, 99, 0)

    def forget(self, slab: Slab) -> None:
        if self.lost:
            raise DeviceError("the GPU has fallen off the bus")

    def map(self, *_: int) -> None:
        self.maps += 1
        if self.maps in self.bad_maps:
            raise DeviceError("busy")


def pool(driver: Any) -> NvidiaMemoryPool:
    return NvidiaMemoryPool(driver, driver, 64, b"g" * 16, lambda: True)


def arena(slabs: int = 8) -> NvidiaArena:
    return NvidiaArena(slabs, None, -1, offline=False)


@pytest.mark.parametrize(
    ("what", "driver", "given", "back"),
    [
        ("all of them", Driver(), [0, 1, 2, 3], 0),
        ("as many as there are", Driver(takes=2), [0, 1], 0),
        ("those before the one that cannot be mapped", Driver(bad_maps=(3,)), [0, 1], 1),
    ],
)
def test_what_can_be_mapped_is_granted(what: str, driver: Driver, given: list[int], back: int) -> None:
    subject = arena()
    assert pool(driver).grant(subject, range(4)) == given
    assert (list(subject.held), len(driver.given)) == (given, back)


@pytest.mark.parametrize(
    ("what", "driver", "error"),
    [
        ("there is none", Driver(takes=0), OutOfDeviceMemory),
        ("the first cannot be mapped", Driver(bad_maps=(1,)), ArenaError),
    ],
)
def test_a_grant_of_nothing_says_why(what: str, driver: Driver, error: type[Exception]) -> None:
    subject = arena()
    with pytest.raises(error) as raised:
        pool(driver).grant(subject, range(4))
    assert (type(raised.value), subject.held) == (error, {})


@pytest.mark.parametrize(
    ("what", "base", "sentence"),
    [
        ("where libcuda puts it", 0x7F00_0020_0000, None),
        ("the last that a GPU reaches", (1 << 57) - 9 * SLAB, None),
        ("between two pages", 0x7F00_0010_0000, "is not aligned"),
        ("across the end of the address space", (1 << 57) - 8 * SLAB, "beyond what a GPU can address"),
        ("at the end of what 64 bits say", (1 << 64) - UNIT, "beyond what a GPU can address"),
    ],
)
def test_where_a_process_says_that_its_arena_lies(what: str, base: int, sentence: str | None) -> None:
    for step in ("attach", "adopt"):
        subject, memory = arena(), pool(Driver())
        fds = [os.open("/dev/null", os.O_RDONLY)] if step == "attach" else []
        subject.quarantine = Slab(0, 0, 0, 0)

        def begin(subject: NvidiaArena = subject, memory: NvidiaMemoryPool = memory, fds: Any = fds) -> None:
            memory.attach(subject, base, fds) if fds else memory.adopt(subject, base, [0], False)

        if sentence is None:
            begin()
            assert subject.base == base
        else:
            with pytest.raises(ArenaError, match=sentence):
                begin()
            assert (subject.base, subject.held, memory.orphans) == (0, {}, 0)
        for fd in fds:
            os.close(fd)


def test_an_arena_ends_on_a_gpu_that_is_lost() -> None:
    """It was adopted; its files are closed all the same."""
    subject, memory = arena(), pool(Driver(lost=True))
    memory.adopt(subject, UNIT, [], False)
    subject.memory_fd = fd = os.open("/dev/null", os.O_RDONLY)
    memory.close(subject)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
