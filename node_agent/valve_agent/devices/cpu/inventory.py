# SPDX-License-Identifier: Apache-2.0
"""The inventory of the `cpu` device: always one device, the machine itself.

Threading model: reads two small files of /proc when asked. Caller: memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from valve_agent.devices.base import DeviceInfo, DeviceMissing


class CpuInventory:
    """Inventory of the `cpu` device. Its `memory_bytes` is the machine's memory: how much Valve hands out
    is the policy's choice."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def devices(self) -> Sequence[DeviceInfo]:
        memory = self._field("meminfo", "MemTotal")
        if memory is None:
            raise DeviceMissing("/proc/meminfo does not say how much memory there is: mount /proc")
        name = self._field("cpuinfo", "model name") or "processor"
        return [DeviceInfo(0, "cpu", "cpu", name, int(memory.split()[0]) * 1024)]

    def _field(self, file: str, name: str) -> str | None:
        """The first value of `name` in a "name: value" file."""
        try:
            lines = (self._proc / file).read_text().splitlines()
        except OSError as error:
            raise DeviceMissing(f"{self._proc / file} cannot be read: {error.strerror}") from error
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
        return None
