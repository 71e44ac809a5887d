# SPDX-License-Identifier: Apache-2.0
"""Python mirror of `runtime/native/include/valve_protocol.h`, the wire between agent and runtime.

Why it exists: the agent (and the launcher, and the tests' fake agent) must read and write exactly
the bytes libvalve does. `tests/native/test_wire.py` compares every size and offset with the header.

Threading model: stateless functions; a socket may be used by one thread at a time. Nothing here
blocks except `send` and `recv` on a blocking socket. Callers: server.py, registry.py, `valve run`.
The page and the ledger, which are shared memory and not frames, are in `shared.py`.

    WireError                  the peer sent something that is no frame; close the connection
    ├── Truncated              fewer bytes than the frame needs
    ├── Oversized              more bytes than the frame has
    ├── BadMagic               not a Valve frame at all
    ├── UnknownType            a frame type that this version does not know
    ├── BadVersion             no protocol version in common          (code EVERSION)
    ├── BadField               a field has a value that no correct peer sends
    ├── WrongDescriptors       the frame came with a wrong number of descriptors
    └── ConnectionClosed       the peer closed the connection (no frame)
"""

from __future__ import annotations

import array
import ctypes
import enum
import itertools
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

MAGIC = 0x564C4156
VERSION_MIN = 1
VERSION_MAX = 2
SLABS_MAX = 4096
BITMAP_WORDS = SLABS_MAX // 64
REQUESTS_MAX = 1024
TEXT_BYTES = 240
NAME_BYTES = 64
MEMORY_BATCH = 3
DESCRIPTORS_MAX = 3
"""Most descriptors that any frame carries."""


class Role(enum.IntEnum):
    NONE = 0
    ONLINE = 1
    OFFLINE = 2


class Device(enum.IntEnum):
    CPU = 1
    NVIDIA = 2


class Type(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    REJECT = 3
    ARENA_OPEN = 4
    ARENA = 5
    ARENA_RESTORE = 6
    WANT = 7
    GRANT = 8
    RECLAIM = 9
    RECLAIMED = 10
    RETURN = 11
    TENANT = 12
    TENANT_OK = 13
    DENIED = 14
    GPU_TABLE = 15
    GPU_FILE = 16
    GPU_FILE_GONE = 17
    MEMORY_OPEN = 32
    MEMORY = 33
    MEMORY_MAPPED = 34
    MEMORY_READY = 35
    MEMORY_MAP = 36
    MEMORY_QUARANTINE = 37
    MEMORY_DONE = 38


class MemoryRoute(enum.IntEnum):
    """Who changes the mappings of an arena on a GPU."""

    BY_AGENT = 1
    BY_TENANT = 2


class RejectCode(enum.IntEnum):
    EPROTO = 1
    EVERSION = 2
    EIDENTITY = 3
    EROLE = 4
    EARENA = 5
    EPERM = 6


class GpuFileKind(enum.IntEnum):
    CTL = 1
    UVM = 2


class Route(enum.IntEnum):
    """Who controls the channels of an offline process; see valve_protocol.h."""

    NONE = 0
    AGENT = 1
    IN_PROCESS = 2
    PATCHED = 3
    LAUNCH_GATE = 4


class HelloFlag(enum.IntFlag):
    HELPER = 1
    BARRIER = 2


class WireError(Exception):
    """The peer broke the protocol. `code` is what a REJECT should carry."""

    code: ClassVar[RejectCode] = RejectCode.EPROTO


class Truncated(WireError):
    pass


class Oversized(WireError):
    pass


class BadMagic(WireError):
    pass


class UnknownType(WireError):
    pass


class BadVersion(WireError):
    code = RejectCode.EVERSION


class BadField(WireError):
    pass


class WrongDescriptors(WireError):
    pass


class ConnectionClosed(WireError):
    pass


class Header(ctypes.LittleEndianStructure):
    magic: int
    version: int
    type: int
    size: int
    seq: int
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint16),
        ("type", ctypes.c_uint16),
        ("size", ctypes.c_uint32),
        ("seq", ctypes.c_uint32),
    )


class Bitmap(ctypes.LittleEndianStructure):
    """A set of slab indices. `Bitmap.of({1, 5})`, `set(bitmap)`, `int(bitmap)`."""

    words: ctypes.Array[ctypes.c_uint64]
    _fields_ = (("words", ctypes.c_uint64 * BITMAP_WORDS),)

    @classmethod
    def of(cls, slabs: Iterable[int]) -> Bitmap:
        """Raises ValueError for an index outside [0, SLABS_MAX)."""
        mask = 0
        for slab in slabs:
            if not 0 <= slab < SLABS_MAX:
                raise ValueError(f"slab {slab} is outside 0..{SLABS_MAX - 1}")
            mask |= 1 << slab
        return cls.from_int(mask)

    @classmethod
    def from_int(cls, mask: int) -> Bitmap:
        return cls.from_buffer_copy(mask.to_bytes(SLABS_MAX // 8, "little"))

    def __int__(self) -> int:
        return int.from_bytes(bytes(self), "little")

    def __iter__(self) -> Iterator[int]:
        return bits(int(self))

    def __len__(self) -> int:
        return int(self).bit_count()


def bits(mask: int) -> Iterator[int]:
    """Indices of the one bits of `mask`, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Frame(ctypes.LittleEndianStructure):
    """A frame. `Want(total=4, urgent=1)` fills the header; `send` numbers it."""

    header: Header
    TYPE: ClassVar[Type]
    DESCRIPTORS: ClassVar[tuple[int, ...]] = (0,)
    """Numbers of descriptors that may come with it."""

    def __init__(self, **fields: object) -> None:
        super().__init__()
        self.header = Header(MAGIC, VERSION_MAX, self.TYPE, ctypes.sizeof(self), 0)
        for name, value in fields.items():
            if not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            setattr(self, name, value)

    def __repr__(self) -> str:
        names = [str(field[0]) for field in self._fields_ if field[0] not in ("header", "reserved")]
        values = (
            f"{name}={set(value) if isinstance(value, Bitmap) else value!r}"
            for name, value in ((name, getattr(self, name)) for name in names)
        )
        return f"{type(self).__name__}({', '.join(values)})"


class Hello(Frame):
    TYPE = Type.HELLO
    version_min: int
    version_max: int
    role_claimed: int
    main_pid: int
    flags: int
    arena_slabs: int
    library: bytes
    comm: bytes
    _fields_ = (
        ("header", Header),
        ("version_min", ctypes.c_uint16),
        ("version_max", ctypes.c_uint16),
        ("role_claimed", ctypes.c_uint32),
        ("main_pid", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("arena_slabs", ctypes.c_uint64),
        ("library", ctypes.c_char * 32),
        ("comm", ctypes.c_char * 16),
    )


class Welcome(Frame):
    TYPE = Type.WELCOME
    DESCRIPTORS = (1, 2)  # {page} or {page, doorbell}
    role: int
    device: int
    tenant: int
    slab_bytes: int
    slabs_limit: int
    lease_ms: int
    _fields_ = (
        ("header", Header),
        ("role", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("tenant", ctypes.c_uint64),
        ("slab_bytes", ctypes.c_uint64),
        ("slabs_limit", ctypes.c_uint32),
        ("lease_ms", ctypes.c_uint32),
    )


class _Refusal(Frame):
    code: int
    text: bytes

    @property
    def sentence(self) -> str:
        return bytes(self.text).decode("utf-8", "replace")


_REFUSAL_FIELDS = (
    ("header", Header),
    ("code", ctypes.c_uint32),
    ("reserved", ctypes.c_uint32),
    ("text", ctypes.c_char * TEXT_BYTES),
)


class Reject(_Refusal):
    TYPE = Type.REJECT
    _fields_ = _REFUSAL_FIELDS


class Denied(_Refusal):
    TYPE = Type.DENIED
    _fields_ = _REFUSAL_FIELDS


class ArenaOpen(Frame):
    TYPE = Type.ARENA_OPEN
    slabs: int
    _fields_ = (("header", Header), ("slabs", ctypes.c_uint64))


class Arena(Frame):
    TYPE = Type.ARENA
    DESCRIPTORS = (3,)  # {arena, quarantine, ledger}
    slabs: int
    slab_bytes: int
    quarantine_bytes: int
    ledger_bytes: int
    _fields_ = (
        ("header", Header),
        ("slabs", ctypes.c_uint64),
        ("slab_bytes", ctypes.c_uint64),
        ("quarantine_bytes", ctypes.c_uint64),
        ("ledger_bytes", ctypes.c_uint64),
    )


class ArenaRestore(Frame):
    TYPE = Type.ARENA_RESTORE
    DESCRIPTORS = (3,)  # {arena, quarantine, ledger}
    slabs: int
    held: Bitmap
    _fields_ = (("header", Header), ("slabs", ctypes.c_uint64), ("held", Bitmap))


class Want(Frame):
    TYPE = Type.WANT
    total: int
    urgent: int
    _fields_ = (("header", Header), ("total", ctypes.c_uint32), ("urgent", ctypes.c_uint32))


class Slabs(Frame):
    """Body of GRANT, RECLAIM, RECLAIMED and RETURN. `at_ns` is CLOCK_MONOTONIC."""

    id: int
    at_ns: int
    set: Bitmap


_SLABS_FIELDS = (
    ("header", Header),
    ("id", ctypes.c_uint64),
    ("at_ns", ctypes.c_uint64),
    ("set", Bitmap),
)


class Grant(Slabs):
    TYPE = Type.GRANT
    _fields_ = _SLABS_FIELDS


class Reclaim(Slabs):
    TYPE = Type.RECLAIM
    _fields_ = _SLABS_FIELDS


class Reclaimed(Slabs):
    TYPE = Type.RECLAIMED
    _fields_ = _SLABS_FIELDS


class Return(Slabs):
    TYPE = Type.RETURN
    _fields_ = _SLABS_FIELDS


class Tenant(Frame):
    TYPE = Type.TENANT
    version_min: int
    version_max: int
    role: int
    memory_bytes: int
    name: bytes
    _fields_ = (
        ("header", Header),
        ("version_min", ctypes.c_uint16),
        ("version_max", ctypes.c_uint16),
        ("role", ctypes.c_uint32),
        ("memory_bytes", ctypes.c_uint64),
        ("name", ctypes.c_char * NAME_BYTES),
    )


class TenantOk(Frame):
    TYPE = Type.TENANT_OK
    tenant: int
    role: int
    _fields_ = (
        ("header", Header),
        ("tenant", ctypes.c_uint64),
        ("role", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class MemoryOpen(Frame):
    TYPE = Type.MEMORY_OPEN
    slabs: int
    gpu: ctypes.Array[ctypes.c_uint8]
    _fields_ = (("header", Header), ("slabs", ctypes.c_uint64), ("gpu", ctypes.c_uint8 * 16))


class Memory(Frame):
    TYPE = Type.MEMORY
    DESCRIPTORS = (1,)  # {quarantine}
    slabs: int
    slab_bytes: int
    quarantine_bytes: int
    _fields_ = (
        ("header", Header),
        ("slabs", ctypes.c_uint64),
        ("slab_bytes", ctypes.c_uint64),
        ("quarantine_bytes", ctypes.c_uint64),
    )


class MemoryMapped(Frame):
    TYPE = Type.MEMORY_MAPPED
    DESCRIPTORS = (1, 2, 3)  # {uvm, ...}: every open UVM file of the process, at most three
    base: int
    slabs: int
    _fields_ = (("header", Header), ("base", ctypes.c_uint64), ("slabs", ctypes.c_uint64))


class MemoryReady(Frame):
    TYPE = Type.MEMORY_READY
    route: int
    _fields_ = (("header", Header), ("route", ctypes.c_uint32), ("reserved", ctypes.c_uint32))


class MemoryMap(Frame):
    TYPE = Type.MEMORY_MAP
    DESCRIPTORS = (1, 2, 3)
    id: int
    count: int
    slab: ctypes.Array[ctypes.c_uint32]
    _fields_ = (
        ("header", Header),
        ("id", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("slab", ctypes.c_uint32 * MEMORY_BATCH),
    )


class MemoryQuarantine(Frame):
    TYPE = Type.MEMORY_QUARANTINE
    id: int
    set: Bitmap
    _fields_ = (("header", Header), ("id", ctypes.c_uint64), ("set", Bitmap))


class MemoryDone(Frame):
    TYPE = Type.MEMORY_DONE
    id: int
    result: int
    _fields_ = (
        ("header", Header),
        ("id", ctypes.c_uint64),
        ("result", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class GpuTable(Frame):
    TYPE = Type.GPU_TABLE
    DESCRIPTORS = (2,)  # {table, bell}
    table_bytes: int
    _fields_ = (("header", Header), ("table_bytes", ctypes.c_uint64))


_GPU_FILE_FIELDS = (("header", Header), ("number", ctypes.c_uint32), ("kind", ctypes.c_uint32))


class GpuFile(Frame):
    TYPE = Type.GPU_FILE
    DESCRIPTORS = (1,)
    number: int
    kind: int
    _fields_ = _GPU_FILE_FIELDS


class GpuFileGone(Frame):
    TYPE = Type.GPU_FILE_GONE
    number: int
    kind: int
    _fields_ = _GPU_FILE_FIELDS


FRAMES: dict[int, type[Frame]] = {
    cls.TYPE: cls
    for cls in (
        Hello, Welcome, Reject, ArenaOpen, Arena, ArenaRestore, Want, Grant, Reclaim, Reclaimed,
        Return, Tenant, TenantOk, Denied, MemoryOpen, Memory, MemoryMapped, MemoryReady, MemoryMap,
        MemoryQuarantine, MemoryDone, GpuTable, GpuFile, GpuFileGone,
    )
}  # fmt: skip
HEADER_BYTES = ctypes.sizeof(Header)
_RECV_BYTES = 4096
_OPENING = (Type.HELLO, Type.TENANT)
"""Types that open a connection: they carry the sender's range of versions."""


def parse(data: bytes) -> Frame:
    """The frame in one packet. Raises a WireError whose text says what is wrong with it."""
    if len(data) < HEADER_BYTES:
        raise Truncated(f"a frame of {len(data)} bytes is shorter than the {HEADER_BYTES}-byte header")
    header = Header.from_buffer_copy(data)
    if header.magic != MAGIC:
        raise BadMagic(f"magic 0x{header.magic:08x} is not Valve's 0x{MAGIC:08x}: this is no Valve peer")
    cls = FRAMES.get(header.type)
    if cls is None:
        raise UnknownType(f"frame type {header.type} is unknown to protocol versions {_versions()}")
    _check_version(cls, header, data)
    want = ctypes.sizeof(cls)
    for what, size in (("is", len(data)), ("says it is", header.size)):
        if size < want:
            raise Truncated(f"{cls.TYPE.name} {what} {size} bytes long; it must be {want}")
        if size > want:
            raise Oversized(f"{cls.TYPE.name} {what} {size} bytes long; it must be {want}")
    return cls.from_buffer_copy(data)


def _check_version(cls: type[Frame], header: Header, data: bytes) -> None:
    if cls.TYPE in _OPENING:
        end = HEADER_BYTES + 4
        if len(data) < end:
            raise Truncated(f"{cls.TYPE.name} is {len(data)} bytes long; it must be {ctypes.sizeof(cls)}")
        low = int.from_bytes(data[HEADER_BYTES : HEADER_BYTES + 2], "little")
        high = int.from_bytes(data[HEADER_BYTES + 2 : end], "little")
        if low > VERSION_MAX or high < VERSION_MIN or low > high:
            raise BadVersion(
                f"the peer speaks protocol versions {low}..{high}, this side {_versions()}: "
                "install the same version of Valve on both sides"
            )
    elif cls.TYPE != Type.REJECT and not VERSION_MIN <= header.version <= VERSION_MAX:
        raise BadVersion(
            f"{cls.TYPE.name} has protocol version {header.version}, this side speaks {_versions()}"
        )


def _versions() -> str:
    return f"{VERSION_MIN}..{VERSION_MAX}"


_sequence = itertools.count(1)


def send(sock: socket.socket, frame: Frame, fds: Sequence[int] = ()) -> None:
    """Send one frame with its descriptors. Raises OSError (BlockingIOError where it would block)."""
    if len(fds) not in frame.DESCRIPTORS:
        raise ValueError(f"{frame.TYPE.name} carries {frame.DESCRIPTORS} descriptors, not {len(fds)}")
    frame.header.seq = next(_sequence) & 0xFFFFFFFF
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([bytes(frame)], control, socket.MSG_NOSIGNAL)


def recv(sock: socket.socket, flags: int = 0) -> tuple[Frame, list[int]]:
    """One frame and its descriptors (close-on-exec; the caller owns them).

    Raises WireError (every descriptor that came is closed), OSError, BlockingIOError.
    """
    data, control, result_flags, _ = sock.recvmsg(
        _RECV_BYTES, socket.CMSG_SPACE(4 * DESCRIPTORS_MAX), flags | socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    try:
        if result_flags & socket.MSG_CTRUNC:
            raise WrongDescriptors(f"more than {DESCRIPTORS_MAX} descriptors came with one frame")
        if not data:
            raise ConnectionClosed("the peer closed the connection")
        if result_flags & socket.MSG_TRUNC:
            raise Oversized(f"a packet longer than {_RECV_BYTES} bytes; no frame is that long")
        frame = parse(data)
        if len(fds) not in frame.DESCRIPTORS:
            raise WrongDescriptors(
                f"{frame.TYPE.name} came with {len(fds)} descriptors; it must be one of {frame.DESCRIPTORS}"
            )
    except WireError:
        for fd in fds:
            os.close(fd)
        raise
    return frame, fds.tolist()
