# SPDX-License-Identifier: Apache-2.0
"""Opens the memory of one GPU for the agent.

Why it exists: main.py knows no device; here libcuda, the RM client, UVM and the pool come together.

Threading model: called by main before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable

from valve_agent.devices.base import DeviceError, DeviceMissing
from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.cuda_driver import CudaDriver
from valve_agent.devices.nvidia.memory import NvidiaMemoryPool
from valve_agent.devices.nvidia.physical import PhysicalSlabs
from valve_agent.devices.nvidia.uvm import Mapper

QUARANTINES = 64
"""Most arenas at once; each has a quarantine allocation of one slab, from what is not in the pool."""


def open_memory(uuid: str, slabs: int, slab_bytes: int, hold_stands: Callable[[], bool]) -> NvidiaMemoryPool:
    """The pool of the GPU with that NVML UUID; no slab is made yet. Raises DeviceError."""
    version = rm.driver_version()
    branch = rm.branch_of(version or "")
    if branch is None:
        raise DeviceError(
            f"driver {version} is of no branch whose memory interface Valve knows "
            f"({', '.join(rm.BRANCHES)}): install one of those, or update Valve"
        )
    driver = CudaDriver()
    gpu = bytes.fromhex(uuid.removeprefix("GPU-").replace("-", ""))
    ordinals = [n for n in range(driver.devices()) if driver.uuid(n) == gpu]
    if not ordinals:
        raise DeviceMissing(f"libcuda does not see {uuid}: unset CUDA_VISIBLE_DEVICES for the agent")
    physical = PhysicalSlabs(driver, ordinals[0], slab_bytes, slabs + QUARANTINES, uuid=gpu)
    mapper = Mapper(branch, gpu, physical.client.fd, physical.client.handle)
    return NvidiaMemoryPool(physical, mapper, slabs, gpu, hold_stands)
