# SPDX-License-Identifier: Apache-2.0
"""Device memory of the `cpu` device: one sparse file per tenant process, taken back by punching holes.

Why it exists: on `cpu` the "device memory" is a budget, and what makes it real is that a slab's pages
exist only while it is granted. Files are made by the agent and passed as descriptors, so that no
tenant can open another's. Huge pages matter: taking 256 MiB back costs about 1 ms with 2 MiB pages and
40 ms with 4 KiB pages. A tmpfs mounted `huge=always` gives them on first touch, whatever the machine's
shmem_enabled says; the mount is never attached to any path. Without the privilege to mount, a memfd is
used, and `why_small_pages` says what is lost.

Threading model: used by the server thread only; every call is a few system calls. Callers: server.py,
main.py.

Errors: devices/base.py (ArenaError, OutOfDeviceMemory).
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable, Iterator

from valve_agent.devices.base import ArenaError, OutOfDeviceMemory
from valve_agent.devices.cpu.inventory import CpuInventory
from valve_agent.wire import SLABS_MAX

QUARANTINE_BYTES = 2 << 20
"""One huge page: every slab that is not granted shows it."""

_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432  # the same number on every architecture
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC = 1, 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOEXEC = 2, 4, 8
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_TMPFS_MAGIC = 0x01021994
_PREFERRED_MOUNT = {"size": "0", "huge": "always", "mode": "0700"}  # size 0: no limit but the pool's own

_libc = ctypes.CDLL(None, use_errno=True)


def runs(slabs: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive indices as (first, count): few large calls instead of many small ones."""
    first = count = 0
    for slab in sorted(slabs):
        if count and slab == first + count:
            count += 1
        else:
            if count:
                yield first, count
            first, count = slab, 1
    if count:
        yield first, count


class CpuArena:
    """The memory of one tenant process: `slabs` slabs, of which only the granted ones should have pages."""

    def __init__(self, memory_fd: int, quarantine_fd: int, slabs: int, quarantine_bytes: int) -> None:
        self.memory_fd = memory_fd
        self.quarantine_fd = quarantine_fd
        self.slabs = slabs
        self.quarantine_bytes = quarantine_bytes


class CpuMemoryPool:
    """Makes arenas, and adopts those that runtimes bring back after an agent's restart."""

    def __init__(self, slab_bytes: int, *, prefer_huge: bool = True) -> None:
        """`slab_bytes`: a multiple of QUARANTINE_BYTES, or a divisor of it."""
        self.slab_bytes = slab_bytes
        self.quarantine_bytes = min(QUARANTINE_BYTES, slab_bytes)
        self.why_small_pages: str | None = None
        self._mount_fd: int | None = None
        if slab_bytes % self.quarantine_bytes:
            raise ArenaError(f"a slab of {slab_bytes} bytes is no multiple of {self.quarantine_bytes}")
        if not prefer_huge:
            self.why_small_pages = "huge pages were not asked for"
            return
        try:
            self._mount_fd = _mount_huge_tmpfs()
            os.close(self._open_on_mount())
        except OSError as error:
            self.shut_down()
            self.why_small_pages = (
                f"no private tmpfs with huge pages ({error}): arenas are memory files with 4 KiB pages "
                "unless shmem_enabled allows more, and reclaim is about 40 times slower; run the agent with "
                "CAP_SYS_ADMIN, or write 'always' to /sys/kernel/mm/transparent_hugepage/shmem_enabled"
            )

    @property
    def huge_pages(self) -> bool:
        """Whether arenas get 2 MiB pages by right (not by luck)."""
        return self._mount_fd is not None

    def create(self, slabs: int) -> CpuArena:
        """A new arena with nothing granted. Raises ArenaError."""
        if not 0 < slabs <= SLABS_MAX:
            raise OutOfDeviceMemory(f"an arena has 1..{SLABS_MAX} slabs, not {slabs}")
        made: list[int] = []
        try:
            for name, size_bytes in self._sizes(slabs):
                made.append(self._file(name))
                os.ftruncate(made[-1], size_bytes)
        except OSError as error:
            for fd in made:
                os.close(fd)
            raise ArenaError(f"the kernel gives no arena of {slabs} slabs: {error}") from error
        return CpuArena(made[0], made[1], slabs, self.quarantine_bytes)

    def restore(self, memory_fd: int, quarantine_fd: int, slabs: int) -> CpuArena:
        """The arena that a runtime kept over an agent's restart. Takes the descriptors over unless it
        raises ArenaError."""
        if not 0 < slabs <= SLABS_MAX:
            raise ArenaError(f"an arena has 1..{SLABS_MAX} slabs, not {slabs}")
        for fd, (name, size_bytes) in zip((memory_fd, quarantine_fd), self._sizes(slabs), strict=True):
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or _filesystem(fd) != _TMPFS_MAGIC:
                raise ArenaError(f"the descriptor of the {name} is no file on a memory file system")
            if status.st_size != size_bytes:
                raise ArenaError(f"the {name} has {status.st_size} bytes where {size_bytes} are right")
        return CpuArena(memory_fd, quarantine_fd, slabs, self.quarantine_bytes)

    def discard(self, arena: CpuArena, slabs: Iterable[int]) -> None:
        """The memory of these slabs returns to the machine at once; contents are gone. Raises ArenaError."""
        for first, count in runs(slabs):
            try:
                _check(
                    _libc.fallocate(
                        arena.memory_fd,
                        _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE,
                        ctypes.c_int64(first * self.slab_bytes),
                        ctypes.c_int64(count * self.slab_bytes),
                    ),
                    "fallocate",
                )
            except OSError as error:
                last = first + count - 1
                raise ArenaError(f"slabs {first}..{last} cannot be given back: {error}") from error

    def resident_bytes(self, arena: CpuArena) -> int:
        """Bytes of pages that exist in the arena now, as the kernel counts them."""
        return os.fstat(arena.memory_fd).st_blocks * 512

    def close(self, arena: CpuArena) -> None:
        os.close(arena.memory_fd)
        os.close(arena.quarantine_fd)

    def shut_down(self) -> None:
        """Forget the mount; arenas that exist live on."""
        if self._mount_fd is not None:
            os.close(self._mount_fd)
            self._mount_fd = None

    def _sizes(self, slabs: int) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("valve-arena", slabs * self.slab_bytes), ("valve-quarantine", self.quarantine_bytes)

    def _file(self, name: str) -> int:
        return self._open_on_mount() if self._mount_fd is not None else os.memfd_create(name, os.MFD_CLOEXEC)

    def _open_on_mount(self) -> int:
        assert self._mount_fd is not None
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_EXCL  # O_EXCL: no linkat can give it a name
        return os.open(".", flags, 0o600, dir_fd=self._mount_fd)


def check_fits_machine(device_bytes: int) -> None:
    """Raises OutOfDeviceMemory when the device's memory is more than the machine has."""
    (machine,) = CpuInventory().devices()
    total = machine.memory_bytes
    if device_bytes > total:
        most = total * 3 // 4 >> 20
        raise OutOfDeviceMemory(
            f"the policy gives the cpu device {device_bytes >> 20}Mi, the machine has {total >> 20}Mi in "
            f"all: write {most}Mi or less as the policy's device memory (the engines need the rest)"
        )


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _mount_huge_tmpfs() -> int:
    fs = _check(_libc.syscall(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC), "fsopen")
    try:
        for key, value in _PREFERRED_MOUNT.items():
            _check(
                _libc.syscall(_SYS_FSCONFIG, fs, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0),
                f"fsconfig {key}={value}",
            )
        _check(_libc.syscall(_SYS_FSCONFIG, fs, _FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig create")
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | _MOUNT_ATTR_NOEXEC
        return _check(_libc.syscall(_SYS_FSMOUNT, fs, _FSMOUNT_CLOEXEC, attributes), "fsmount")
    finally:
        os.close(fs)


class _Statfs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 248))


def _filesystem(fd: int) -> int:
    result = _Statfs()
    _check(_libc.fstatfs(fd, ctypes.byref(result)), "fstatfs")
    return int(result.f_type)
