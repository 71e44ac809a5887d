# SPDX-License-Identifier: Apache-2.0
"""Changing what lies at an address of another process, below its libcuda: two ioctls of /dev/nvidia-uvm.

Why it exists: a process whose channels are disabled may be stopped, and its libcuda may wait for work that
cannot end. UVM asks neither: it looks at the open file only, writes page tables through channels of its own,
and a map replaces what it overlaps in one call. So the agent remaps a tenant's slab on the tenant's UVM file,
with memory of its own, and the tenant never gets a handle that it could map again later. Facts and their
sources: the open kernel modules 535 to 595, uvm_map_external.c; on hardware not yet verified.

Threading model: a `Mapper` belongs to one thread (it reuses its parameter block). Callers: memory.py.

    DeviceError
    └── UvmError           UVM refused; `.status` is its code
"""

from __future__ import annotations

import fcntl
import struct

from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia import rm

MAP_EXTERNAL_ALLOCATION = 33
MAP_EXTERNAL_SPARSE = 74
_HEAD = struct.Struct("<QQQ")  # base, length, offset
_ATTRIBUTES_BYTES = 36  # UUID, then mapping type, caching, format, element bits, compression: 0 is default
_TAIL = struct.Struct("<QiIII")  # number of attributes, rmCtrlFd, hClient, hMemory, rmStatus
_SPARSE = struct.Struct("<QQ16sII")  # base, length, UUID, rmStatus


class UvmError(DeviceError):
    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: status {rm.describe(status)}")
        self.status = status


class Mapper:
    """Maps memory of one RM client on one GPU."""

    def __init__(self, branch: rm.Branch, gpu: bytes, ctl_fd: int, client: int) -> None:
        """`gpu`: UUID of the GPU. `ctl_fd`: the client's control file."""
        self._gpu = gpu
        self._ctl_fd = ctl_fd
        self._client = client
        self._tail_at = _HEAD.size + branch.uvm_max_gpus * _ATTRIBUTES_BYTES
        self._block = bytearray(self._tail_at + _TAIL.size)
        self._block[_HEAD.size : _HEAD.size + 16] = gpu

    def map(self, uvm_fd: int, base: int, length: int, memory: int) -> None:
        """Let [base, base + length) of the address space behind `uvm_fd` show the first `length` bytes of the
        memory object; what was there is gone. Not atomic: nothing may execute there. Raises UvmError."""
        _HEAD.pack_into(self._block, 0, base, length, 0)
        _TAIL.pack_into(self._block, self._tail_at, 1, self._ctl_fd, self._client, memory, 0)
        self._ioctl(uvm_fd, MAP_EXTERNAL_ALLOCATION, self._block)
        status = _TAIL.unpack_from(self._block, self._tail_at)[4]
        if status != rm.OK:
            raise UvmError(f"mapping {length} bytes at 0x{base:x}", status)

    def sparse(self, uvm_fd: int, base: int, length: int) -> None:
        """Let the range read as zeros and swallow stores, without memory behind it. Raises UvmError."""
        block = bytearray(_SPARSE.pack(base, length, self._gpu, 0, 0))
        self._ioctl(uvm_fd, MAP_EXTERNAL_SPARSE, block)
        status = _SPARSE.unpack(block)[3]
        if status != rm.OK:
            raise UvmError(f"making {length} bytes at 0x{base:x} sparse", status)

    def _ioctl(self, uvm_fd: int, number: int, block: bytearray) -> None:
        try:
            fcntl.ioctl(uvm_fd, number, block, True)
        except OSError as error:
            raise DeviceError(f"UVM does not take ioctl {number}: {error.strerror}") from error
