# SPDX-License-Identifier: Apache-2.0
"""Which NVIDIA GPUs there are, what happens to them, and who uses them: NVML's word.

Why it exists: NVML is the one source of truth for memory and processes that everybody on the node can check
with nvidia-smi; and it reports what RM does not tell a client: Xid events and lost GPUs.

Threading model: one thread at a time; every call is a few system calls, none waits. Callers: parts.py (the
server thread, once a second), `valve doctor`. Never the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pynvml  # type: ignore[import-untyped]

from valve_agent.devices.base import DeviceError, DeviceInfo, DeviceMissing

XID_LOST = 79
_XIDS = {
    13: "a kernel did what it must not (Xid 13)",
    31: "a kernel touched memory that is not mapped (Xid 31)",
    43: "the GPU stopped a channel after a fault of its kernel (Xid 43)",
    45: "a channel was torn down with work in it (Xid 45)",
    48: "an uncorrectable memory error (Xid 48): drain the node",
    XID_LOST: "the GPU has fallen off the bus (Xid 79): drain the node and reset or replace it",
    109: "a context switch took too long (Xid 109)",
    119: "the GPU's firmware did not answer (Xid 119): reset the GPU",
}


def xid_sentence(number: int) -> str:
    return _XIDS.get(number, f"Xid {number}: see NVIDIA's list of Xid errors")


class GpuEvent(NamedTuple):
    xid: int
    sentence: str


class GpuProcess(NamedTuple):
    pid: int
    """In the pid namespace of the driver, the host's."""
    used_bytes: int


class NvidiaInventory:
    """Inventory of NVIDIA GPUs, and the events of one of them. Close it."""

    def __init__(self) -> None:
        """Raises DeviceMissing where there is no driver or no library."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DeviceMissing(
                f"NVML does not start: {error}. Load the NVIDIA driver, and give the agent libnvidia-ml.so.1 "
                "of the same version; `valve doctor` says what is missing"
            ) from error
        self._events: object | None = None

    def __enter__(self) -> NvidiaInventory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._events is not None:
            pynvml.nvmlEventSetFree(self._events)
            self._events = None
        pynvml.nvmlShutdown()

    def driver_version(self) -> str:
        return str(_text(pynvml.nvmlSystemGetDriverVersion()))

    def devices(self) -> Sequence[DeviceInfo]:
        """Raises DeviceMissing, also for a driver without a GPU."""
        return [self.device(number) for number in range(self.count())]

    def count(self) -> int:
        """At least 1. Raises DeviceMissing."""
        try:
            count = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as error:
            raise DeviceMissing(f"NVML cannot list the GPUs: {error}; see `dmesg` for an Xid") from error
        if not count:
            raise DeviceMissing("the NVIDIA driver is loaded but sees no GPU: is one passed to this machine?")
        return count

    def device(self, number: int) -> DeviceInfo:
        """Raises DeviceMissing."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            return DeviceInfo(
                number,
                _text(pynvml.nvmlDeviceGetUUID(handle)),
                "nvidia",
                _text(pynvml.nvmlDeviceGetName(handle)),
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                _numa_node(_text(pynvml.nvmlDeviceGetPciInfo(handle).busIdLegacy)),
            )
        except pynvml.NVMLError as error:
            raise DeviceMissing(
                f"NVML cannot reach GPU {number}: {error}; see `dmesg` for an Xid, and reset or replace it"
            ) from error

    def processes(self, number: int) -> Sequence[GpuProcess]:
        """Every process with a compute context on that GPU. Raises DeviceError."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except pynvml.NVMLError as error:
            raise DeviceError(f"NVML cannot list the processes of GPU {number}: {error}") from error
        return [GpuProcess(int(entry.pid), int(entry.usedGpuMemory or 0)) for entry in running]

    def watch(self, number: int) -> None:
        """Collect the Xid events of that GPU from now on. Raises DeviceError."""
        try:
            events = pynvml.nvmlEventSetCreate()
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
        except pynvml.NVMLError as error:
            raise DeviceError(f"NVML reports no events of GPU {number}: {error}") from error
        self._events = events

    def happened(self) -> Sequence[GpuEvent]:
        """Xid events since the last call, oldest first, without waiting."""
        found: list[GpuEvent] = []
        while self._events is not None:
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except pynvml.NVMLError as error:
                if error.value != pynvml.NVML_ERROR_TIMEOUT:
                    self._events = None
                    found.append(GpuEvent(0, f"NVML reports no more events of the GPU: {error}"))
                break
            number = int(event.eventData)
            found.append(GpuEvent(number, xid_sentence(number)))
        return found


def _numa_node(bus_id: str, pci: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """`bus_id`: as in 0000:01:00.0; None where the kernel does not say."""
    try:
        number = int((pci / bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return number if number >= 0 else None


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
