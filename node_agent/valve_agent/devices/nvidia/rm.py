# SPDX-License-Identifier: Apache-2.0
"""The resource manager's ioctl interface: numbers, parameter blocks, status codes, driver branches.

Why it exists: one place that knows the driver's user ABI, as data read from the open kernel modules of the
releases named in `BRANCHES`. What differs between branches is there; everything else was found equal in all.

A control is an ioctl that carries a pointer to its parameters. `Control` prepares both blocks once, so that
the hot path is one system call. ioctl() returning 0 is no success: the status is in the block.

Threading model: stateless; a `Control` belongs to one thread. Callers: blocks.py, routes.py, probe.py and the
qualification. The gate process imports this module: standard library only.

    DeviceError
    └── RmError              the driver refused; `.status` is its code
        ├── ClientRefused    the client belongs to another open file (0x23)
        ├── NotPermitted     a privilege is missing (0x1b)
        ├── NotSupported     no such control here (0x56)
        ├── GpuLost          the GPU has fallen off the bus (0x0f)
        └── StaleHandle      an object of that handle does not exist (0x57 and kin)
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from valve_agent.devices.base import DeviceError

CTL_PATH = "/dev/nvidiactl"
VERSION_PATH = "/proc/driver/nvidia/version"

# Escapes: _IOWR('F', number, size).
ESC_FREE = 0x29
ESC_CONTROL = 0x2A
ESC_ALLOC = 0x2B
ESC_REGISTER_FD = 201

# Classes.
ROOT_CLIENT = 0x41
DEVICE = 0x80
SUBDEVICE = 0x2080

# Controls.
GPU_GET_PROBED_IDS = 0x214
GPU_GET_NAME_STRING = 0x20800110
GPU_GET_UUID_INFO = 0x274
FIFO_DISABLE_CHANNELS = 0x2080110B
GET_CTXSW_MODES = 0x20801235
TSG_GPFIFO_SCHEDULE = 0xA06C0101
TSG_GET_TIMESLICE = 0xA06C0104
TSG_PREEMPT = 0xA06C0105
TSG_GET_INFO = 0xA06C0106
RESTART_RUNLIST = 0xA06F0111
_UUID_INFO = struct.Struct("<256sIIII")  # UUID, flags, gpuId, deviceInstance, subdeviceInstance
_UUID_IS_BINARY = 2

ENGINE_GRAPHICS = 1
"""engineType of GR0, where compute runs; 2..8 are the other GR engines of a partitioned GPU."""
ENGINE_GRAPHICS_LAST = 8
ENGINE_COPY_FIRST, ENGINE_COPY_LAST = 9, 0x12
CHANNELS_PER_CALL = 64

# Status codes.
OK = 0x00
GPU_IS_LOST = 0x0F
INSUFFICIENT_PERMISSIONS = 0x1B
INVALID_ARGUMENT = 0x1F
INVALID_CLIENT = 0x23
INVALID_OBJECT_HANDLE = 0x33
INVALID_OBJECT_PARENT = 0x36
INVALID_PARAM_STRUCT = 0x3A
INVALID_STATE = 0x40
NO_MEMORY = 0x51
NOT_SUPPORTED = 0x56
OBJECT_NOT_FOUND = 0x57
TIMEOUT = 0x65
INVALID_CHANNEL = 0x21

_MEANING = {
    GPU_IS_LOST: "the GPU has fallen off the bus (GPU_IS_LOST)",
    INSUFFICIENT_PERMISSIONS: "a privilege is missing (INSUFFICIENT_PERMISSIONS)",
    INVALID_ARGUMENT: "the driver does not take these parameters (INVALID_ARGUMENT)",
    INVALID_CLIENT: "the client belongs to another open file (INVALID_CLIENT)",
    INVALID_CHANNEL: "no such channel (INVALID_CHANNEL)",
    INVALID_OBJECT_HANDLE: "no such object (INVALID_OBJECT_HANDLE)",
    INVALID_OBJECT_PARENT: "no such parent (INVALID_OBJECT_PARENT)",
    INVALID_PARAM_STRUCT: "the parameters have another size in this driver (INVALID_PARAM_STRUCT)",
    INVALID_STATE: "the object is in no state for it (INVALID_STATE)",
    NO_MEMORY: "out of memory (NO_MEMORY)",
    NOT_SUPPORTED: "not supported here, by the driver or by a sandbox (NOT_SUPPORTED)",
    OBJECT_NOT_FOUND: "no such object (OBJECT_NOT_FOUND)",
    TIMEOUT: "the GPU's firmware did not answer in time (TIMEOUT)",
}
STALE = frozenset((INVALID_CHANNEL, INVALID_OBJECT_HANDLE, OBJECT_NOT_FOUND))


def describe(status: int) -> str:
    """'0x1b: a privilege is missing (INSUFFICIENT_PERMISSIONS)'."""
    return f"0x{status:02x}: {_MEANING.get(status, 'see nvstatuscodes.h of the driver')}"


class RmError(DeviceError):
    """`what` names the call."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: status {describe(status)}")
        self.status = status


class ClientRefused(RmError):
    pass


class NotPermitted(RmError):
    pass


class NotSupported(RmError):
    pass


class GpuLost(RmError):
    pass


class StaleHandle(RmError):
    pass


_ERRORS: dict[int, type[RmError]] = {
    INVALID_CLIENT: ClientRefused,
    INSUFFICIENT_PERMISSIONS: NotPermitted,
    NOT_SUPPORTED: NotSupported,
    GPU_IS_LOST: GpuLost,
    **dict.fromkeys(STALE, StaleHandle),
}


def error_of(what: str, status: int) -> RmError:
    return _ERRORS.get(status, RmError)(what, status)


class Branch(NamedTuple):
    """What differs between driver branches, of what Valve uses. Sizes in bytes."""

    name: str
    read_from: str
    """The version whose sources the figures were read from."""
    channel_params: int
    """NV_CHANNEL_ALLOC_PARAMS; the offsets that Valve reads are the same everywhere."""
    schedule_params: int
    """GPFIFO_SCHEDULE of a TSG and of a channel."""
    probed_ids: int
    """GPU_GET_PROBED_IDS."""
    name_string: int
    """GPU_GET_NAME_STRING."""
    vaspace_params: int
    memory_params: int
    uvm_max_gpus: int
    """Entries of perGpuAttributes in UVM_MAP_EXTERNAL_ALLOCATION."""


BRANCHES = {
    branch.name: branch
    for branch in (
        Branch("535", "535.288.01", 360, 2, 256, 132, 48, 120, 32),
        Branch("550", "550.163.01", 360, 2, 256, 132, 48, 128, 256),
        Branch("560", "560.35.03", 360, 2, 256, 132, 48, 128, 256),
        Branch("565", "565.77", 360, 2, 256, 132, 48, 128, 256),
        Branch("570", "570.211.01", 368, 2, 256, 132, 48, 128, 256),
        Branch("575", "575.64.05", 368, 3, 256, 132, 48, 128, 256),
        Branch("580", "580.142", 368, 3, 384, 132, 56, 128, 256),
        Branch("590", "590.48.01", 368, 3, 384, 132, 56, 128, 256),
        Branch("595", "595.45.04", 368, 3, 384, 68, 56, 128, 256),
    )
}
_VERSION = re.compile(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b")


def driver_version(path: str = VERSION_PATH) -> str | None:
    """The version of the loaded driver, '580.142'; None where there is no driver. Raises DeviceError for a
    file that cannot be understood."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error.strerror}") from error
    found = _VERSION.search(text.partition("\n")[0])
    if found is None:
        raise DeviceError(f"{path} names no driver version: {text[:120]!r}")
    return found.group(1)


def branch_of(version: str) -> Branch | None:
    """The branch of a driver version; None for one whose layouts nobody has checked."""
    return BRANCHES.get(version.partition(".")[0])


def iowr(number: int, size: int) -> int:
    """_IOWR('F', number, size)."""
    return 3 << 30 | size << 16 | ord("F") << 8 | number


class Free(ctypes.Structure):
    """NVOS00_PARAMETERS."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("root", "parent", "object", "status"))


class Alloc(ctypes.Structure):
    """NVOS21_PARAMETERS, the short form."""

    _fields_ = (
        ("root", ctypes.c_uint32),
        ("parent", ctypes.c_uint32),
        ("object", ctypes.c_uint32),
        ("hclass", ctypes.c_uint32),
        ("params", ctypes.c_uint64),
        ("params_size", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
    )


class AllocWide(ctypes.Structure):
    """NVOS64_PARAMETERS, the long form."""

    _fields_ = (
        ("root", ctypes.c_uint32),
        ("parent", ctypes.c_uint32),
        ("object", ctypes.c_uint32),
        ("hclass", ctypes.c_uint32),
        ("params", ctypes.c_uint64),
        ("rights", ctypes.c_uint64),
        ("params_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class ControlCall(ctypes.Structure):
    """NVOS54_PARAMETERS. `flags` must be 0."""

    _fields_ = (
        ("client", ctypes.c_uint32),
        ("object", ctypes.c_uint32),
        ("command", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("params", ctypes.c_uint64),
        ("params_size", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
    )


class DisableChannels(ctypes.Structure):
    """NV2080_CTRL_FIFO_DISABLE_CHANNELS_PARAMS. Only `disable`, `count` and the lists are ever set: with
    `only_scheduling` what runs would stay, `rewind` would drop queued work, an event needs the kernel."""

    disable: int
    count: int
    client: ctypes.Array[ctypes.c_uint32]
    channel: ctypes.Array[ctypes.c_uint32]
    _fields_ = (
        ("disable", ctypes.c_uint8),
        ("pad0", ctypes.c_uint8 * 3),
        ("count", ctypes.c_uint32),
        ("only_scheduling", ctypes.c_uint8),
        ("rewind", ctypes.c_uint8),
        ("pad1", ctypes.c_uint8 * 6),
        ("event", ctypes.c_uint64),
        ("client", ctypes.c_uint32 * CHANNELS_PER_CALL),
        ("channel", ctypes.c_uint32 * CHANNELS_PER_CALL),
    )


class Preempt(ctypes.Structure):
    """NVA06C_CTRL_PREEMPT_PARAMS."""

    _fields_ = (
        ("wait", ctypes.c_uint8),
        ("manual_timeout", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 2),
        ("timeout_us", ctypes.c_uint32),
    )


class RestartRunlist(ctypes.Structure):
    """NVA06F_CTRL_RESTART_RUNLIST_PARAMS."""

    _fields_ = (("force", ctypes.c_uint8), ("bypass_wait", ctypes.c_uint8))


SIZES = {
    Free: 16,
    Alloc: 32,
    AllocWide: 48,
    ControlCall: 32,
    DisableChannels: 536,
    Preempt: 8,
    RestartRunlist: 2,
}
assert all(ctypes.sizeof(cls) == size for cls, size in SIZES.items())

_IOCTL_CONTROL = iowr(ESC_CONTROL, 32)
_IOCTL_ALLOC = iowr(ESC_ALLOC, 32)
_IOCTL_FREE = iowr(ESC_FREE, 16)
_ioctl = fcntl.ioctl


class Control:
    """One prepared RM control. `params` may be changed between calls."""

    __slots__ = ("_call", "params")

    def __init__(
        self, client: int, handle: int, command: int, params: ctypes.Structure | None = None
    ) -> None:
        """`handle` is the object that the control is for. `params` is kept and must not be moved."""
        self.params = params
        at, size = (ctypes.addressof(params), ctypes.sizeof(params)) if params is not None else (0, 0)
        self._call = ControlCall(client, handle, command, 0, at, size, 0)

    def issue(self, fd: int) -> int:
        """One ioctl on an open control file; returns the RM status. Raises OSError when the file takes no
        such ioctl at all."""
        _ioctl(fd, _IOCTL_CONTROL, self._call)
        return int(self._call.status)

    def __repr__(self) -> str:
        call = self._call
        return f"control 0x{call.command:x} of object 0x{call.object:x} of client 0x{call.client:x}"


def disable_blocks(client: int, subdevice: int, channels: Sequence[int], disable: bool) -> list[Control]:
    """FIFO_DISABLE_CHANNELS for these channels of one client on one subdevice, at most 64 a call. The lists
    name no client but the caller's own: whatever handles a tenant claims, others are out of reach."""
    blocks = []
    for start in range(0, len(channels), CHANNELS_PER_CALL):
        batch = channels[start : start + CHANNELS_PER_CALL]
        params = DisableChannels(disable=int(disable), count=len(batch))
        params.client[: len(batch)] = [client] * len(batch)
        params.channel[: len(batch)] = list(batch)
        blocks.append(Control(client, subdevice, FIFO_DISABLE_CHANNELS, params))
    return blocks


def preempt_block(client: int, group: int, timeout_us: int = 100_000) -> Control:
    """PREEMPT of one TSG that waits until it is off. Alone it does not keep work away: disable first."""
    return Control(client, group, TSG_PREEMPT, Preempt(1, 1, (ctypes.c_uint8 * 2)(), timeout_us))


def restart_block(client: int, channel: int) -> Control:
    """RESTART_RUNLIST through one channel; the caller needs CAP_SYS_NICE."""
    return Control(client, channel, RESTART_RUNLIST, RestartRunlist(1, 0))


class RmClient:
    """An RM client of our own: for probes, doctor and the qualification, never for a hot path."""

    ROOT_CLASS: ClassVar[int] = ROOT_CLIENT

    def __init__(self, fd: int | None = None, handle: int | None = None) -> None:
        """A new client on a new open file; or the client `handle` on the open file `fd`, which stays the
        caller's. Raises RmError; DeviceError when there is no control file to open."""
        self._own = fd is None
        if fd is None:
            try:
                fd = os.open(CTL_PATH, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                hint = (
                    "load the NVIDIA driver (`modprobe nvidia`)"
                    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV)
                    else "run as root or give this user access to it"
                )
                raise DeviceError(f"{CTL_PATH} cannot be opened: {error.strerror}; {hint}") from error
        self.fd = fd
        self.handle = 0
        if handle is not None:
            self.handle = handle
            return
        try:
            self.handle = self.alloc(0, self.ROOT_CLASS, b"")
        except DeviceError:
            self.close()
            raise

    def alloc(self, parent: int, hclass: int, params: bytes) -> int:
        """A new object; the driver chooses its handle. Raises RmError."""
        buffer = ctypes.create_string_buffer(params, len(params)) if params else None
        at = ctypes.addressof(buffer) if buffer is not None else 0
        call = Alloc(self.handle, parent, 0, hclass, at, len(params), 0)
        self._ioctl(_IOCTL_ALLOC, call, f"allocation of class 0x{hclass:x}")
        if call.status != OK:
            raise error_of(f"allocation of class 0x{hclass:x}", call.status)
        return int(call.object)

    def control(self, handle: int, command: int, params: bytes = b"") -> bytes:
        """The parameters as the driver left them. Raises RmError."""
        buffer = ctypes.create_string_buffer(params, len(params)) if params else None
        at = ctypes.addressof(buffer) if buffer is not None else 0
        call = ControlCall(self.handle, handle, command, 0, at, len(params), 0)
        self._ioctl(_IOCTL_CONTROL, call, f"control 0x{command:x}")
        if call.status != OK:
            raise error_of(f"control 0x{command:x}", call.status)
        return buffer.raw if buffer is not None else b""

    def device_instance(self, uuid: bytes) -> int:
        """The RM's number (deviceId of NV01_DEVICE_0) of the GPU with that UUID (16 bytes); NVML and CUDA may
        count otherwise. Raises RmError."""
        params = _UUID_INFO.pack(uuid, _UUID_IS_BINARY, 0, 0, 0)
        return int(_UUID_INFO.unpack(self.control(self.handle, GPU_GET_UUID_INFO, params))[3])

    def free(self, handle: int) -> None:
        """Raises RmError."""
        call = Free(self.handle, 0, handle, 0)
        self._ioctl(_IOCTL_FREE, call, f"free of 0x{handle:x}")
        if call.status != OK:
            raise error_of(f"free of 0x{handle:x}", call.status)

    def close(self) -> None:
        """The driver frees the client and all below it with the last descriptor of its file."""
        if self._own and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> RmClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ioctl(self, request: int, call: ctypes.Structure, what: str) -> None:
        try:
            _ioctl(self.fd, request, call)
        except OSError as error:
            raise DeviceError(f"{what}: the control file does not take it: {error.strerror}") from error
