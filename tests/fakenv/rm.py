# SPDX-License-Identifier: Apache-2.0
"""RM and UVM calls by raw ioctl, for processes on a fake machine: a client without libcuda.

Layouts as in abi.h, written a second time so that a slip in one of them shows. Sizes that differ
between branches are the caller's business.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

FREE, CONTROL, ALLOC, DUP, SHARE, XFER = 0x29, 0x2A, 0x2B, 0x34, 0x35, 211
ROOT_CLIENT, DEVICE, SUBDEVICE, VASPACE, TSG, CHANNEL, MEMORY = (
    0x41,
    0x80,
    0x2080,
    0x90F1,
    0xA06C,
    0xC86F,
    0x40,
)
DISABLE_CHANNELS, PREEMPT, RESTART_RUNLIST = 0x2080110B, 0xA06C0105, 0xA06F0111
TSG_SCHEDULE, TSG_INFO, SET_TIMESLICE, GET_TIMESLICE = 0xA06C0101, 0xA06C0106, 0xA06C0103, 0xA06C0104
OK, NO_PERMISSION, INVALID_ARGUMENT, INVALID_CLIENT, NOT_SUPPORTED = 0, 0x1B, 0x1F, 0x23, 0x56
INVALID_PARAM_STRUCT, INVALID_STATE, OBJECT_NOT_FOUND, GPU_IS_LOST = 0x3A, 0x40, 0x57, 0x0F


def iowr(number: int, size: int) -> int:
    """_IOWR('F', number, size)"""
    return 3 << 30 | size << 16 | ord("F") << 8 | number


def escape(fd: int, number: int, data: bytes, xfer: bool = False) -> bytes:
    """One escape; returns the parameters as the driver left them. Raises OSError."""
    if xfer:
        inner = ctypes.create_string_buffer(data, len(data))
        fcntl.ioctl(
            fd, iowr(XFER, 16), bytearray(struct.pack("IIQ", number, len(data), ctypes.addressof(inner)))
        )
        return inner.raw
    buffer = bytearray(data)
    fcntl.ioctl(fd, iowr(number, len(data)), buffer, True)
    return bytes(buffer)


class Client:
    """One RM client on one open control file. Calls return the RM status and keep no state."""

    def __init__(
        self, path: str = "/dev/nvidiactl", fd: int | None = None, handle: int | None = None
    ) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC) if fd is None else fd
        if handle is None:
            status, handle = self.alloc(0, ROOT_CLIENT, b"", root=0)
            assert status == OK, hex(status)
        self.handle = handle

    def alloc(
        self,
        parent: int,
        hclass: int,
        params: bytes,
        handle: int = 0,
        wide: bool = False,
        xfer: bool = False,
        root: int | None = None,
    ) -> tuple[int, int]:
        """RM_ALLOC in its short or wide form: (status, handle)."""
        buffer = ctypes.create_string_buffer(params, max(1, len(params)))
        at = ctypes.addressof(buffer) if params else 0
        head = struct.pack("IIIIQ", self.handle if root is None else root, parent, handle, hclass, at)
        if wide:
            data = escape(self.fd, ALLOC, head + struct.pack("QIIII", 0, len(params), 0, 0xDEAD, 0), xfer)
            return struct.unpack_from("I", data, 40)[0], struct.unpack_from("I", data, 8)[0]
        data = escape(self.fd, ALLOC, head + struct.pack("II", len(params), 0xDEAD), xfer)
        return struct.unpack_from("I", data, 28)[0], struct.unpack_from("I", data, 8)[0]

    def control(self, handle: int, command: int, params: bytes, xfer: bool = False) -> tuple[int, bytes]:
        """RM_CONTROL: (status, parameters afterwards)."""
        buffer = ctypes.create_string_buffer(params, max(1, len(params)))
        at = ctypes.addressof(buffer) if params else 0
        data = struct.pack("IIIIQII", self.handle, handle, command, 0, at, len(params), 0xDEAD)
        return struct.unpack_from("I", escape(self.fd, CONTROL, data, xfer), 28)[0], buffer.raw[: len(params)]

    def free(self, handle: int) -> int:
        out = escape(self.fd, FREE, struct.pack("IIII", self.handle, 0, handle, 0xDEAD))
        status: int = struct.unpack("IIII", out)[3]
        return status

    def dup(self, parent: int, source_client: int, source: int) -> tuple[int, int]:
        data = struct.pack("IIIIIII", self.handle, parent, 0, source_client, source, 0, 0xDEAD)
        out = struct.unpack("IIIIIII", escape(self.fd, DUP, data))
        return out[6], out[2]

    def share(self, handle: int, target: int) -> int:
        """Lets client `target` dup the object (share type CLIENT, action COMPOSE)."""
        data = struct.pack("IIIIHBBI", self.handle, handle, target, 1, 3, 4, 0, 0xDEAD)
        status: int = struct.unpack("IIIIHBBI", escape(self.fd, SHARE, data))[7]
        return status

    def disable(
        self,
        subdevice: int,
        channels: list[int],
        on: bool = True,
        only: bool = False,
        rewind: bool = False,
        event: int = 0,
        client: int | None = None,
        count: int | None = None,
    ) -> int:
        """FIFO_DISABLE_CHANNELS for channels of `client` (default: this one); on=False enables."""
        head = struct.pack("B3xIBB6xQ", on, len(channels) if count is None else count, only, rewind, event)
        clients = struct.pack(
            "64I", *[client or self.handle] * min(64, len(channels)), *[0] * (64 - len(channels))
        )
        handles = struct.pack("64I", *channels[:64], *[0] * (64 - len(channels)))
        return self.control(subdevice, DISABLE_CHANNELS, head + clients + handles)[0]

    def preempt(self, tsg: int, wait: bool = True, timeout_us: int = 100000) -> int:
        return self.control(tsg, PREEMPT, struct.pack("BBxxI", wait, 1, timeout_us))[0]

    def tree(self, channels: int = 2, channel_size: int = 368) -> dict[str, object]:
        """Device, subdevice, one compute group and its channels; every status must be OK."""
        made: dict[str, object] = {}

        def add(parent: int, hclass: int, params: bytes, wide: bool = False) -> int:
            status, handle = self.alloc(parent, hclass, params, wide=wide)
            assert status == OK, (hex(hclass), hex(status))
            return handle

        device = add(self.handle, DEVICE, bytes(56))
        made["device"], made["subdevice"] = device, add(device, SUBDEVICE, bytes(4))
        tsg = add(device, TSG, struct.pack("5I", 0, 0, 0, 1, 0), wide=True)
        made["tsg"], made["channels"] = tsg, [add(tsg, CHANNEL, bytes(channel_size)) for _ in range(channels)]
        return made


def try_open(path: str) -> int:
    """0, or the errno of opening it."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as error:
        return error.errno or -1
    return 0


def descriptors(inodes: list[int]) -> list[int]:
    """This process's descriptors of the given files, as the supervisor's status names them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.stat(f"/proc/self/fd/{name}").st_ino in inodes:  # fstat would say what a driver says
                found.append(int(name))
        except OSError:  # the listing's own descriptor
            continue
    return found


def subdevice_of(client: Client, name_size: int = 132) -> int:
    """The first object that answers GPU_GET_NAME_STRING: how a test without an interposer finds it."""
    return next(
        h for h in range(0x5C000000, 0x5C000100) if client.control(h, 0x20800110, bytes(name_size))[0] == OK
    )


def uvm(fd: int, command: int, data: bytes, status_at: int) -> int:
    """One UVM ioctl; returns its rmStatus."""
    buffer = bytearray(data)
    fcntl.ioctl(fd, command, buffer, True)
    status: int = struct.unpack_from("I", buffer, status_at)[0]
    return status


def uvm_open() -> int:
    fd = os.open("/dev/nvidia-uvm", os.O_RDWR | os.O_CLOEXEC)
    assert uvm(fd, 0x30000001, bytes(16), 8) == OK
    return fd


def uvm_sparse(fd: int, base: int, length: int) -> int:
    return uvm(fd, 74, struct.pack("QQ16xIxxxx", base, length, 0xDEAD), 32)


def uvm_map(
    fd: int, base: int, length: int, client: int, memory: int, max_gpus: int = 256, offset: int = 0
) -> int:
    attributes = b"fakenv-gpu-uuid\0" + bytes(20) + bytes(36 * (max_gpus - 1))
    tail = struct.pack("QiIII", 1, -1, client, memory, 0xDEAD)
    return uvm(fd, 33, struct.pack("QQQ", base, length, offset) + attributes + tail, 24 + 36 * max_gpus + 20)
