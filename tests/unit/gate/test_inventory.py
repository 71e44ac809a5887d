# SPDX-License-Identifier: Apache-2.0
"""What the cpu device says it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from valve_agent.devices.base import DeviceMissing
from valve_agent.devices.cpu.inventory import CpuInventory


def test_one_device_with_the_machines_name_and_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16384 kB\nMemFree: 1 kB\n")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    (device,) = CpuInventory(tmp_path).devices()
    assert (device.kind, device.name, device.memory_bytes) == ("cpu", "Some CPU @ 2 GHz", 16 << 20)


@pytest.mark.parametrize("content", [None, "MemFree: 1 kB\n"], ids=["no file", "no MemTotal"])
def test_a_machine_that_does_not_tell_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "meminfo").write_text(content)
    with pytest.raises(DeviceMissing, match="meminfo"):
        CpuInventory(tmp_path).devices()


def test_this_machine_tells() -> None:
    (device,) = CpuInventory().devices()
    assert device.memory_bytes > 0
