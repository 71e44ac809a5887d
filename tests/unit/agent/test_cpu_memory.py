# SPDX-License-Identifier: Apache-2.0
"""Arenas of the cpu device: pages exist only while a slab is used, and forged ones are refused."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from valve_agent.devices.base import ArenaError, MemoryPool, OutOfDeviceMemory
from valve_agent.devices.cpu.memory import CpuArena, CpuMemoryPool, check_fits_machine, runs

SLAB_BYTES = 2 << 20


@pytest.fixture(params=[True, False], ids=["huge pages if possible", "memory files"])
def pool(request: pytest.FixtureRequest) -> Iterator[CpuMemoryPool]:
    made = CpuMemoryPool(SLAB_BYTES, prefer_huge=request.param)
    yield made
    made.shut_down()


@pytest.mark.parametrize(
    ("slabs", "expected"),
    [
        ([], []),
        ([0], [(0, 1)]),
        ([3, 1, 2, 7], [(1, 3), (7, 1)]),
        (range(128), [(0, 128)]),
        ([0, 2, 4], [(0, 1), (2, 1), (4, 1)]),
    ],
)
def test_runs(slabs: list[int], expected: list[tuple[int, int]]) -> None:
    assert list(runs(slabs)) == expected


def test_it_is_a_memory_pool(pool: CpuMemoryPool) -> None:
    seam: MemoryPool[CpuArena] = pool
    assert seam.slab_bytes == SLAB_BYTES


def test_pages_come_with_use_and_go_with_discard(pool: CpuMemoryPool) -> None:
    arena = pool.create(8)
    assert pool.resident_bytes(arena) == 0
    with mmap.mmap(arena.memory_fd, 8 * SLAB_BYTES) as memory:
        memory[: 4 * SLAB_BYTES] = b"x" * (4 * SLAB_BYTES)
        assert pool.resident_bytes(arena) == 4 * SLAB_BYTES
        pool.discard(arena, [1, 2])
        assert pool.resident_bytes(arena) == 2 * SLAB_BYTES
        assert memory[SLAB_BYTES : SLAB_BYTES + 5] == bytes(5), "the contents are gone"
        assert memory[:5] == b"xxxxx"
        assert memory[3 * SLAB_BYTES : 3 * SLAB_BYTES + 5] == b"xxxxx"
    pool.close(arena)


def test_arenas_share_nothing(pool: CpuMemoryPool) -> None:
    arenas = [pool.create(1), pool.create(1)]
    os.pwrite(arenas[0].memory_fd, b"secret", 0)
    os.pwrite(arenas[0].quarantine_fd, b"secret", 0)
    assert os.pread(arenas[1].memory_fd, 6, 0) == bytes(6)
    assert os.pread(arenas[1].quarantine_fd, 6, 0) == bytes(6)
    for arena in arenas:
        pool.close(arena)


def test_an_arena_can_be_restored(pool: CpuMemoryPool) -> None:
    first = pool.create(4)
    os.pwrite(first.memory_fd, b"kept", 0)
    again = pool.restore(os.dup(first.memory_fd), os.dup(first.quarantine_fd), 4)
    pool.close(first)
    assert os.pread(again.memory_fd, 4, 0) == b"kept"
    pool.close(again)


@pytest.mark.parametrize(
    ("what", "slabs", "sentence"),
    [("another size", 5, "bytes where"), ("no slabs", 0, "1.."), ("too many slabs", 5000, "1..")],
)
def test_a_wrong_arena_is_refused(pool: CpuMemoryPool, what: str, slabs: int, sentence: str) -> None:
    arena = pool.create(4)
    with pytest.raises(ArenaError, match=sentence):
        pool.restore(arena.memory_fd, arena.quarantine_fd, slabs)
    pool.close(arena)


def test_what_is_no_memory_file_is_refused(pool: CpuMemoryPool) -> None:
    reader, writer = os.pipe()
    with pytest.raises(ArenaError, match="no file on a memory file system"):
        pool.restore(reader, writer, 4)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("slabs", [0, 4097])
def test_an_arena_has_a_sensible_size(pool: CpuMemoryPool, slabs: int) -> None:
    with pytest.raises(OutOfDeviceMemory):
        pool.create(slabs)


def test_a_device_larger_than_the_machine_is_refused_with_a_size_to_write() -> None:
    check_fits_machine(1 << 20)
    with pytest.raises(OutOfDeviceMemory, match=r"write \d+Mi or less"):
        check_fits_machine(1 << 50)


def test_no_huge_pages_says_what_it_costs() -> None:
    pool = CpuMemoryPool(SLAB_BYTES, prefer_huge=False)
    assert not pool.huge_pages
    assert pool.why_small_pages
