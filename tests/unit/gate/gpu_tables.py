# SPDX-License-Identifier: Apache-2.0
"""A process's channel table as its libvalve writes it."""

from __future__ import annotations

import os
import struct

from valve_agent.devices.nvidia.table import MAGIC, TABLE_BYTES, ChannelSlot, GpuTable, TableLayout
from valve_agent.shared import _sealed_memfd


def table_fd() -> int:
    """An empty table; the caller's to close."""
    fd = _sealed_memfd("table", TABLE_BYTES)
    os.pwrite(fd, struct.pack("I", MAGIC), 0)
    return fd


def fill(table: GpuTable, *channels: tuple[int, int, int, int, int, int]) -> None:
    """(file, client, subdevice, group, channel, engine)"""
    layout: TableLayout = table._at
    for index, values in enumerate(channels):
        layout.channels[index] = ChannelSlot(1, *values, 0xC86F)
    layout.slots = len(channels)
    layout.changes += 1
