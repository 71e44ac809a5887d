# SPDX-License-Identifier: Apache-2.0
"""What differs between the devices that an agent can share, put together once at its start.

Why it exists: main.py and agent.py know no device. `cpu_parts` and `nvidia_parts` ask for settings
for that device and say which gate to start.

Threading model: called by main before anything runs; `watch` is the server thread's, once a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from valve_agent.devices.base import DeviceError, DeviceInfo, DeviceMissing
from valve_agent.devices.cpu.inventory import CpuInventory
from valve_agent.devices.cpu.memory import check_fits_machine
from valve_agent.wire import Device
from valve_api.settings import EffectiveSettings

if TYPE_CHECKING:
    from valve_agent.devices.nvidia.probe import Choice

Emit = Callable[..., None]
SettingsOf = Callable[[int | None], EffectiveSettings]
"""The settings on a device of so many bytes; None: the policy's own cpu device. See Surroundings.settings."""


@dataclass
class Parts:
    device: Device
    gate_device: str
    """What gate_main understands."""
    settings: EffectiveSettings
    info: DeviceInfo
    gpu_bytes: int | None = None
    """What the settings were asked for."""
    route: Mapping[str, Any] = field(default_factory=dict)
    """How compute is controlled and why, for status and log; empty where there is only one way."""
    watch: Callable[[Emit], None] = lambda emit: None
    """Once a second: tell what happened to the device."""
    processes: Callable[[], Mapping[int, int]] | None = None
    """pid -> bytes, of every process that computes on the device; None where nobody knows. May raise
    DeviceError."""
    close: Callable[[], None] = lambda: None


def cpu_parts(settings_of: SettingsOf) -> Parts:
    """Raises PolicyError, DeviceError."""
    settings = settings_of(None)
    check_fits_machine(settings.device_bytes)
    (machine,) = CpuInventory().devices()
    return Parts(Device.CPU, "cpu", settings, machine)


def nvidia_parts(settings_of: SettingsOf, gpus: str, commit: str, unusable: dict[str, str]) -> list[Parts]:
    """Of the GPUs that `gpus` names (see _numbers), as far as they can be shared; `unusable` gets the others,
    and why. `commit`: see plan.Commit. Raises PolicyError; DeviceError: no driver, no such GPU."""
    from valve_agent.devices.nvidia import probe

    @cache
    def choose(route: str) -> probe.Choice:
        return probe.choose(route, commit)  # the same for every GPU: one driver answers

    found = []
    for number in _numbers(gpus):
        try:
            found.append(_of_gpu(settings_of, number, choose))
        except DeviceError as error:
            unusable[f"GPU {number}"] = str(error)
    return found


def _numbers(wanted: str) -> list[int]:
    """The GPUs to share, as NVML counts them: `all`, or numbers with commas. Raises DeviceMissing."""
    from valve_agent.devices.nvidia.inventory import NvidiaInventory

    with NvidiaInventory() as inventory:
        count = inventory.count()
    if wanted == "all":
        return list(range(count))
    words = [word.strip() for word in wanted.split(",")]
    wrong = [word for word in words if not word.isdecimal() or int(word) >= count]
    if wrong:
        raise DeviceMissing(
            f"--gpus {wanted}: there is no GPU {wrong[0]!r}; this machine has {count}. Say `all`, or numbers "
            "as nvidia-smi shows them, such as 0,2"
        )
    return sorted({int(word) for word in words})


def _of_gpu(settings_of: SettingsOf, number: int, choose: Callable[[str], Choice]) -> Parts:
    """Raises PolicyError, DeviceError: also where no route works that the policy allows."""
    from valve_agent.devices.nvidia.inventory import NvidiaInventory

    inventory = NvidiaInventory()
    try:
        info = inventory.device(number)
        settings = settings_of(info.memory_bytes)
        choice = choose(settings.route)
        inventory.watch(number)
    except BaseException:
        inventory.close()
        raise

    def watch(emit: Emit) -> None:
        for event in inventory.happened():
            emit("xid", level="error", xid=event.xid, why=event.sentence)

    def processes() -> Mapping[int, int]:
        return {process.pid: process.used_bytes for process in inventory.processes(number)}

    route = {"wanted": settings.route, **choice.document()}
    return Parts(
        Device.NVIDIA,
        choice.gate_device(),
        settings,
        info,
        info.memory_bytes,
        route,
        watch,
        processes,
        inventory.close,
    )
