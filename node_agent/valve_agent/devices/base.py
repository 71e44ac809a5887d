# SPDX-License-Identifier: Apache-2.0
"""The seam between Valve and a device: what exists, who may compute, who has which memory.

Why it exists: the gate, the pool and everything above them know only these protocols, so that the
`cpu` device and a GPU run under the same code.

Threading model: an object behind a protocol belongs to one thread. `ComputeControl` lives in the gate
process, `MemoryPool` and `Inventory` in the agent's main process. Callers: gate.py (ComputeControl),
pool.py (MemoryPool), main.py (Inventory). The gate process imports this module: standard library only.

    DeviceError                the device cannot do what was asked
    ├── DeviceMissing          no such device on this machine
    ├── ComputeError           pausing or resuming failed
    │   ├── TargetRefused      a process cannot be controlled (no permission, not a process)
    │   └── PauseTimeout       some targets may still execute; `.pids` names them
    └── ArenaError           arena, grant or reclaim failed
        └── OutOfDeviceMemory  larger than the device
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar


class DeviceError(Exception):
    """The device cannot do what was asked; the message says what to do about it."""


class DeviceMissing(DeviceError):
    pass


class ComputeError(DeviceError):
    pass


class TargetRefused(ComputeError):
    pass


class PauseTimeout(ComputeError):
    """Not every target is known to be off the device. The others are paused; call pause again."""

    def __init__(self, pids: Sequence[int], waited_us: float, why: Mapping[int, str]) -> None:
        self.pids = tuple(pids)
        self.waited_us = waited_us
        self.why = dict(why)
        states = ", ".join(f"{pid} ({why.get(pid, 'no state')})" for pid in pids)
        super().__init__(f"not paused after {waited_us:.0f} us: {states}")


class ArenaError(DeviceError):
    pass


class OutOfDeviceMemory(ArenaError):
    pass


class DeviceInfo(NamedTuple):
    """One device as the inventory sees it."""

    number: int
    uuid: str
    kind: str
    """`cpu` or `nvidia`."""
    name: str
    memory_bytes: int
    """What Valve may hand out; on `cpu` a setting, bounded by the machine's memory."""
    numa_node: int | None = None
    """None: not known, or the machine has one."""


class Target(Protocol):
    """One offline process as a ComputeControl knows it; made by `open`, ended by `close`."""

    @property
    def pid(self) -> int: ...

    @property
    def pidfd(self) -> int:
        """Readable once the process is gone."""
        ...


class Inventory(Protocol):
    """Which devices there are."""

    def devices(self) -> Sequence[DeviceInfo]:
        """Raises DeviceMissing."""
        ...


T = TypeVar("T", bound=Target)


class ComputeControl(Protocol[T]):
    """Pauses and resumes processes on one device."""

    def open(self, pid: int, pidfd: int, barrier: bool) -> T:
        """Prepare to control a process: all that is slow happens here. Takes over `pidfd`. `barrier`: the
        process registered for the device's proof of eviction (cpu: membarrier). Raises TargetRefused."""
        ...

    def close(self, target: T) -> None:
        """Forget it, as it is: paused stays paused."""
        ...

    def pause(self, targets: Sequence[T]) -> None:
        """Returns only when no thread of any target executes user code on the device. Idempotent.
        A target that is gone counts as paused. Raises PauseTimeout."""
        ...

    def resume(self, targets: Sequence[T]) -> None:
        """Let all of them run."""
        ...

    def quiesce(self, targets: Sequence[T]) -> None:
        """Like pause, but for everything that can touch the targets' memory (copy engines): before anybody
        else does. Raises PauseTimeout."""
        ...

    def supply(self, target: T, number: int, fds: Sequence[int]) -> None:
        """Descriptors of the process that the device needs to control it. Takes them over, unless it raises
        TargetRefused. What they lead to is stopped or runs only after the next pause or resume."""
        ...

    def withdraw(self, target: T, number: int) -> None:
        """The process has closed what `supply` brought under that number. Idempotent."""
        ...

    def tend(self, targets: Sequence[T]) -> Sequence[tuple[T, str]]:
        """Now and then while they run: prepare what `pause` will need. Returns those that could not be
        controlled now, and why."""
        ...

    def notes(self) -> Sequence[tuple[str, dict[str, object]]]:
        """What happened since the last call: (event, fields)."""
        ...

    def is_gone(self, target: T) -> bool:
        """The process has ended."""
        ...

    def running(self, targets: Sequence[T]) -> Sequence[T]:
        """Those that are neither paused nor gone: somebody else continued them. One cheap look each."""
        ...


class Arena(Protocol):
    """The device memory of one tenant process: `slabs` slabs, none of them populated at first."""

    @property
    def slabs(self) -> int: ...

    @property
    def memory_fd(self) -> int: ...

    @property
    def quarantine_fd(self) -> int: ...

    @property
    def quarantine_bytes(self) -> int: ...


A = TypeVar("A", bound=Arena)


class MemoryPool(Protocol[A]):
    """Makes arenas and takes memory back from them. It does no accounting: that is pool.py's."""

    @property
    def slab_bytes(self) -> int: ...

    def create(self, slabs: int) -> A:
        """Raises OutOfDeviceMemory."""
        ...

    def restore(self, memory_fd: int, quarantine_fd: int, slabs: int) -> A:
        """Take over an arena that an earlier agent made. Raises ArenaError if they are no arena."""
        ...

    def discard(self, arena: A, slabs: Iterable[int]) -> None:
        """The memory of these slabs returns to the machine at once; contents are gone. The tenant must have
        remapped them before."""
        ...

    def resident_bytes(self, arena: A) -> int:
        """Physical memory behind the arena now."""
        ...

    def close(self, arena: A) -> None: ...
