# SPDX-License-Identifier: Apache-2.0
"""Parameter blocks as the driver reads them, byte by byte, and the plan made from a table of channels."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

import pytest
from gpu_tables import fill, table_fd

from valve_agent.devices.base import TargetRefused
from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.plan import Commit, build
from valve_agent.devices.nvidia.table import CHANNELS_MAX, TABLE_BYTES, ChannelSlot, GpuTable
from valve_agent.shared import _sealed_memfd


@pytest.fixture
def table() -> Iterator[GpuTable]:
    fd = table_fd()
    made = GpuTable(fd)
    os.close(fd)
    yield made
    made.close()


def decoded(control: rm.Control) -> tuple[int, int, int, bytes]:
    """(client, object, command, parameters) of a prepared call."""
    call = bytes(control._call)
    client, handle, command, flags, at, size, _ = struct.unpack("IIIIQII", call)
    assert flags == 0, "the driver refuses flags"
    return client, handle, command, ctypes.string_at(at, size)


def test_disable_as_the_driver_reads_it() -> None:
    (block,) = rm.disable_blocks(0xC1D00001, 0x5C000003, [7, 8, 9], True)
    client, handle, command, params = decoded(block)
    assert (client, handle, command, len(params)) == (0xC1D00001, 0x5C000003, 0x2080110B, 536)
    assert struct.unpack_from("B3xIBB6xQ", params) == (1, 3, 0, 0, 0), "only scheduling, rewind, event: never"
    assert struct.unpack_from("64I", params, 24) == (0xC1D00001,) * 3 + (0,) * 61
    assert struct.unpack_from("64I", params, 280) == (7, 8, 9) + (0,) * 61


@pytest.mark.parametrize(
    ("channels", "sizes"), [(0, []), (1, [1]), (64, [64]), (65, [64, 1]), (200, [64, 64, 64, 8])]
)
def test_batches(channels: int, sizes: list[int]) -> None:
    blocks = rm.disable_blocks(1, 2, list(range(100, 100 + channels)), False)
    found = [decoded(block)[3] for block in blocks]
    assert [struct.unpack_from("I", params, 4)[0] for params in found] == sizes
    listed = [
        h for params, n in zip(found, sizes, strict=True) for h in struct.unpack_from(f"{n}I", params, 280)
    ]
    assert listed == list(range(100, 100 + channels))


def test_a_plan_lists_every_channel_of_every_group(table: GpuTable) -> None:
    fill(table, (0, 1, 2, 10, 100, 1), (0, 1, 2, 10, 101, 1), (0, 1, 2, 11, 102, 1), (0, 1, 2, 12, 103, 9),
         (3, 5, 6, 20, 200, 1), (0, 1, 2, 0, 104, 0x13))  # fmt: skip
    plan = build(table, {0: 30, 3: 33}, None, Commit.NONE)
    assert plan.problem is None
    assert (plan.channels, plan.copies, plan.groups, plan.clients) == (6, 2, 3, 2)
    stop = [(fd, decoded(block)) for fd, block in plan.stop_compute]
    assert [(fd, client, handle) for fd, (client, handle, _, _) in stop] == [(30, 1, 2), (33, 5, 6)]
    assert struct.unpack_from("3I", stop[0][1][3], 280) == (100, 101, 102)
    ((_, rest),) = plan.stop_rest
    assert struct.unpack_from("2I", decoded(rest)[3], 280) == (103, 104), (
        "video decoders are no compute either"
    )
    assert len(plan.run) == 2


def test_foreign_clients_are_out_of_reach(table: GpuTable) -> None:
    """A process may claim any handle; each list names the caller's own client only."""
    fill(table, (0, 1, 2, 10, 100, 1), (0, 0xC1D00099, 2, 10, 101, 1))
    for _, block in build(table, {0: 30}, None, Commit.NONE).stop_compute:
        client, _, _, params = decoded(block)
        count = struct.unpack_from("I", params, 4)[0]
        assert struct.unpack_from(f"{count}I", params, 24) == (client,) * count


@pytest.mark.parametrize(
    ("commit", "after"),
    [
        (Commit.PREEMPT, [(10, 0xA06C0105, struct.pack("BBxxI", 1, 1, 100_000)),
                          (11, 0xA06C0105, struct.pack("BBxxI", 1, 1, 100_000))]),
        (Commit.RESTART, [(100, 0xA06F0111, b"\1\0"), (102, 0xA06F0111, b"\1\0")]),
    ],
)  # fmt: skip
def test_the_commit_step_comes_after(
    table: GpuTable, commit: Commit, after: list[tuple[int, int, bytes]]
) -> None:
    fill(table, (0, 1, 2, 10, 100, 1), (0, 1, 2, 10, 101, 1), (0, 1, 2, 11, 102, 1))
    steps = [decoded(block) for _, block in build(table, {0: 30}, None, commit).stop_compute]
    assert steps[0][2] == rm.FIFO_DISABLE_CHANNELS
    assert [(handle, command, params) for _, handle, command, params in steps[1:]] == after


@pytest.mark.parametrize(
    ("what", "channel", "files", "sentence"),
    [
        ("no subdevice", (0, 1, 0, 10, 100, 1), {0: 30}, "has no subdevice that libvalve saw"),
        ("no file", (4, 1, 2, 10, 100, 1), {0: 30}, "has not arrived"),
    ],
)
def test_a_plan_says_what_it_cannot_reach(
    table: GpuTable, what: str, channel: tuple[int, ...], files: dict[int, int], sentence: str
) -> None:
    fill(table, channel)  # type: ignore[arg-type]
    assert sentence in (build(table, files, None, Commit.NONE).problem or ""), what


def test_a_lying_table_does_no_harm(table: GpuTable) -> None:
    table._at.slots = 0xFFFFFFFF
    assert table.read() == (0, [])
    table._at.overflow = 3
    assert "3 of its RM objects" in (build(table, {}, None, Commit.NONE).problem or "")
    for index in range(CHANNELS_MAX):
        table._at.channels[index] = ChannelSlot(1, 0, 1, 2, 3, index, 1, 0)
    assert build(table, {0: 1}, None, Commit.NONE).channels == CHANNELS_MAX


@pytest.mark.parametrize("what", ["unsealed", "small", "no table"])
def test_memory_that_is_no_table_is_refused(what: str) -> None:
    fd = (
        os.memfd_create("x")
        if what == "unsealed"
        else _sealed_memfd("x", 4096 if what == "small" else TABLE_BYTES)
    )
    with pytest.raises(TargetRefused):
        GpuTable(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("text", "version", "branch"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release\nGCC version: 12",
         "580.159.03", "580"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6\n", "535.54.03", "535"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  600.10  Release\n", "600.10", None),
    ],
)  # fmt: skip
def test_versions(tmp_path: object, text: str, version: str, branch: str | None) -> None:
    path = os.path.join(str(tmp_path), "version")
    with open(path, "w") as file:
        file.write(text)
    assert rm.driver_version(path) == version
    found = rm.branch_of(version)
    assert (found.name if found else None) == branch
    assert rm.driver_version(path + "-missing") is None
