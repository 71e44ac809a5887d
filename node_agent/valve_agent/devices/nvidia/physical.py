# SPDX-License-Identifier: Apache-2.0
"""The device memory that the agent owns: slabs made ahead, each known to libcuda and to the RM.

Why it exists: memory must move between tenants without being allocated on the way. A slab is one
cuMemCreate allocation that never goes away while the agent lives. It is exported once, so that a tenant's
libcuda can import it, and imported once into an RM client of the agent's own, so that UVM can be told to map
it anywhere. cuMemCreate needs no CUDA context. Zeroing does, since only the GPU can write device memory: with
`scrub` the agent keeps one context and an address for every slab, and a slab is zero before anyone gets it.

Threading model: the server thread. Callers: memory.py.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass

from valve_agent.devices.base import ArenaError, DeviceError, OutOfDeviceMemory
from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.cuda_driver import OUT_OF_MEMORY, CudaDriver, CudaError

IMPORT_OBJECT_FROM_FD = 0x3D06
_IMPORT = struct.Struct("<iIIII")  # fd, type, hDevice, hParent, hObject
_RM_OBJECT = 1
_DEVICE_PARAMS_BYTES = 56
ADOPTED = -1


@dataclass(eq=False, slots=True)
class Slab:
    """One physical allocation."""

    number: int
    handle: int
    """libcuda's, in the agent's process"""
    memory: int
    """the RM's, under the agent's own client"""
    address: int
    """where the agent maps it in order to zero it; 0 without scrubbing"""
    dirty: bool = False
    """somebody had it since it was last zeroed"""


class PhysicalSlabs:
    """Slabs of one GPU."""

    def __init__(
        self,
        driver: CudaDriver,
        ordinal: int,
        slab_bytes: int,
        room: int,
        *,
        uuid: bytes = b"",
        scrub: bool = True,
    ) -> None:
        """`ordinal`: the GPU as libcuda numbers it; the RM is asked for the one of that `uuid` (16 bytes;
        without: the same number). `room`: most slabs that will ever be made. Raises DeviceError."""
        granularity = driver.granularity(ordinal)
        if slab_bytes % granularity:
            raise ArenaError(
                f"a slab of {slab_bytes} bytes is no multiple of this GPU's {granularity}: change "
                "spec.memory.slabSize in the policy"
            )
        self.slab_bytes = slab_bytes
        self.granularity = granularity
        """bytes; memory is mapped at multiples of it"""
        self.made = 0
        self._room = room
        self._driver = driver
        self._ordinal = ordinal
        self._free: list[Slab] = []
        self._scrub_base = 0
        self.client = rm.RmClient()
        instance = self.client.device_instance(uuid) if uuid else ordinal
        params = struct.pack("<I", instance).ljust(_DEVICE_PARAMS_BYTES, b"\0")
        self._device = self.client.alloc(self.client.handle, rm.DEVICE, params)
        if scrub:
            driver.retain_context(ordinal)
            self._scrub_base = driver.reserve(room * slab_bytes)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def scrubs(self) -> bool:
        return self._scrub_base != 0

    def fill(self, count: int) -> int:
        """Have `count` free slabs, or as many as the GPU has memory for: how many there are."""
        while len(self._free) < count:
            try:
                self._free.append(self._make())
            except OutOfDeviceMemory:
                break
        return len(self._free)

    def take(self) -> Slab:
        """A slab that is zero (if slabs are scrubbed). Raises OutOfDeviceMemory when there is none free and
        none can be made; other DeviceErrors from the driver."""
        slab = self._free.pop() if self._free else self._make()
        if slab.dirty:
            try:
                self._zero([slab])
            except DeviceError:
                self._free.insert(0, slab)  # it stays dirty; the others may do
                raise
        return slab

    def give(self, slabs: list[Slab]) -> None:
        """They come back with somebody's data in them. Zeroed at once: the next tenant may be waiting."""
        for slab in slabs:
            slab.dirty = self.scrubs
        self._free += slabs
        if self.scrubs and slabs:
            with contextlib.suppress(DeviceError):  # still dirty: `take` tries again, and says why it cannot
                self._zero(slabs)

    def export(self, slab: Slab) -> int:
        """A descriptor that a tenant's libcuda can import; the caller's to close."""
        return self._driver.export(slab.handle)

    def adopt(self, fd: int) -> Slab:
        """The allocation behind a descriptor that an earlier agent exported. It belongs to no pool: `forget`
        it when it is no longer needed."""
        return Slab(ADOPTED, 0, self._import_fd(fd), 0)

    def forget(self, slab: Slab) -> None:
        """Give up an adopted allocation."""
        self.client.free(slab.memory)

    def close(self) -> None:
        """Everything that no tenant has mapped returns to the GPU."""
        while self._free:
            slab = self._free.pop()
            if slab.address:
                self._driver.unmap(slab.address, self.slab_bytes)
            self._driver.release(slab.handle)
        self.client.close()

    def _make(self) -> Slab:
        if self.made >= self._room:
            raise OutOfDeviceMemory(f"all {self._room} slabs of this GPU exist already")
        try:
            handle = self._driver.create(self._ordinal, self.slab_bytes)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            raise OutOfDeviceMemory(
                f"the GPU has no {self.slab_bytes >> 20}Mi left: {self.made} slabs were made; lower the "
                "memory that the policy gives to Valve, or end what else uses the GPU"
            ) from error
        address = 0
        try:
            memory = self._import(handle)
            if self._scrub_base:
                address = self._scrub_base + self.made * self.slab_bytes
                self._driver.map(self._ordinal, address, self.slab_bytes, handle)
        except DeviceError:
            self._driver.release(handle)
            raise
        self.made += 1
        return Slab(self.made - 1, handle, memory, address)

    def _import(self, handle: int) -> int:
        fd = self._driver.export(handle)
        try:
            return self._import_fd(fd)
        finally:
            os.close(fd)

    def _import_fd(self, fd: int) -> int:
        params = _IMPORT.pack(fd, _RM_OBJECT, self._device, self._device, 0)
        answer = self.client.control(self.client.handle, IMPORT_OBJECT_FROM_FD, params)
        return int(_IMPORT.unpack(answer)[4])

    def _zero(self, slabs: list[Slab]) -> None:
        for slab in slabs:
            self._driver.zero(slab.address, self.slab_bytes)
        self._driver.synchronize()
        for slab in slabs:
            slab.dirty = False
