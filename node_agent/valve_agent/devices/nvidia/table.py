# SPDX-License-Identifier: Apache-2.0
"""The table of an offline process's GPU channels: `struct valve_gpu_table`, memory that libvalve fills.

Why it exists: a channel must be under the gate before the thread that made it can use it, and the gate must
see at one glance whether anything has changed. A message would come too late.

The process writes it, so nothing in it is believed further than its own client reaches: handles are only ever
used on the file that the process itself has passed. A channel is one slot that appears and disappears by a
single store; `changes` counts. Agent and runtime each write fields of their own.

Threading model: the gate's thread. Callers: compute.py, the memory device (read only). Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Any, NamedTuple

from valve_agent.devices.base import TargetRefused
from valve_agent.devices.nvidia import rm

FILES_MAX = 32
CHANNELS_MAX = 1020
TABLE_BYTES = 32768
HOLD_CHANNELS = 1
HOLD_LAUNCHES = 2
MAGIC = 0x564C4156
_HEAD_BYTES = 128
_READ_ATTEMPTS = 8
_F_GET_SEALS = 1034
_SEAL_SHRINK = 0x0002
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine, -1)
_FUTEX_WAKE = 1
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class ChannelSlot(ctypes.LittleEndianStructure):
    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("state", "file", "client", "subdevice", "group", "channel", "engine", "hclass")
    )


class TableLayout(ctypes.LittleEndianStructure):
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint16),
        ("reserved0", ctypes.c_uint16),
        ("hold", ctypes.c_uint32),
        ("taken", ctypes.c_uint32),
        ("command", ctypes.c_uint64),
        ("route", ctypes.c_uint32),
        ("agent_reserved", ctypes.c_uint8 * 36),
        ("changes", ctypes.c_uint64),
        ("answered", ctypes.c_uint64),
        ("answer", ctypes.c_uint32),
        ("slots", ctypes.c_uint32),
        ("overflow", ctypes.c_uint32),
        ("launch_hooks", ctypes.c_uint32),
        ("launches_held", ctypes.c_uint64),
        ("runtime_reserved", ctypes.c_uint8 * 24),
        ("channels", ChannelSlot * CHANNELS_MAX),
    )


class Channel(NamedTuple):
    """One live channel as the process reports it. Handles are RM's."""

    file: int
    client: int
    subdevice: int
    """0: none is known, so it cannot be controlled."""
    group: int
    """0: in no TSG."""
    channel: int
    engine: int
    hclass: int

    @property
    def computes(self) -> bool:
        return rm.ENGINE_GRAPHICS <= self.engine <= rm.ENGINE_GRAPHICS_LAST


class GpuTable:
    """A view; attributes read and write the shared memory directly."""

    def __init__(self, fd: int) -> None:
        """Maps the table in `fd` (not consumed). Raises TargetRefused for memory that could shrink under us
        or is no table."""
        try:
            seals = fcntl.fcntl(fd, _F_GET_SEALS)
            size = os.fstat(fd).st_size
        except OSError as error:
            raise TargetRefused("the GPU table is no memory file that libvalve made") from error
        if not seals & _SEAL_SHRINK or size < TABLE_BYTES:
            raise TargetRefused(f"the GPU table ({size} bytes) is too small or not sealed against shrinking")
        self._map = mmap.mmap(fd, TABLE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._at: Any = TableLayout.from_buffer(self._map)
        if self._at.magic != MAGIC:
            self.close()
            raise TargetRefused("the GPU table has a wrong magic number: install one version of Valve")
        at = ctypes.addressof(self._at)
        self._hold_at = at + TableLayout.hold.offset
        self._taken_at = at + TableLayout.taken.offset
        self._command_at = at + TableLayout.command.offset

    def close(self) -> None:
        self._at = None
        self._map.close()

    @property
    def changes(self) -> int:
        return int(self._at.changes)

    @property
    def overflow(self) -> int:
        return int(self._at.overflow)

    @property
    def answered(self) -> int:
        return int(self._at.answered)

    @property
    def answer(self) -> int:
        """RM status of the last command; above 0x10000 the error number of the ioctl itself."""
        return int(self._at.answer)

    @property
    def launch_hooks(self) -> int:
        return int(self._at.launch_hooks)

    @property
    def launches_held(self) -> int:
        return int(self._at.launches_held)

    @property
    def hold(self) -> int:
        return int(self._at.hold)

    @hold.setter
    def hold(self, bits: int) -> None:
        """A store; to let go, `wake` too."""
        self._at.hold = bits

    def wake(self) -> None:
        """Wake the threads that waited for a lower hold."""
        _libc.syscall(_SYS_FUTEX, ctypes.c_void_p(self._hold_at), _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)

    @property
    def taken(self) -> int:
        return int(self._at.taken)

    def take(self, file: int) -> None:
        """From now on channels may be made on this file."""
        self._at.taken |= 1 << file
        _libc.syscall(_SYS_FUTEX, ctypes.c_void_p(self._taken_at), _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)

    def leave(self, file: int) -> None:
        self._at.taken &= ~(1 << file) & 0xFFFFFFFF

    @property
    def route(self) -> int:
        return int(self._at.route)

    @route.setter
    def route(self, value: int) -> None:
        self._at.route = value

    def wake_command(self) -> None:
        _libc.syscall(_SYS_FUTEX, ctypes.c_void_p(self._command_at), _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)

    def order(self, command: int) -> None:
        self._at.command = command

    @property
    def command(self) -> int:
        return int(self._at.command)

    def read(self) -> tuple[int, list[Channel]]:
        """(changes, live channels) of one moment, or the best that can be had while the process changes it:
        the gate looks at `changes` again after it has acted."""
        for _ in range(_READ_ATTEMPTS):
            before = self.changes
            slots = min(int(self._at.slots), CHANNELS_MAX)
            raw = self._map[_HEAD_BYTES : _HEAD_BYTES + slots * ctypes.sizeof(ChannelSlot)]
            words = memoryview(raw).cast("I")
            found = [Channel(*words[i + 1 : i + 8]) for i in range(0, len(words), 8) if words[i] == 1]
            if self.changes == before:
                break
        return before, found
