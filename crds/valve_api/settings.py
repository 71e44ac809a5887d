# SPDX-License-Identifier: Apache-2.0
"""A policy as it holds on one device: plain integers, the only form that the agent's paths see.

No third-party import here, so a process that needs only the values (the gate) stays
small. Percentages become slabs, durations nanoseconds; what cannot be right on this
device is refused with the field to change. Immutable; built once in main.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from valve_api.errors import PolicyError, Problem
from valve_api.names import ARENA_SLABS_MAX, DEVICE_SLABS_MAX, DEVICE_SLABS_MIN
from valve_api.quantity import Share, format_quantity

if TYPE_CHECKING:
    from valve_api.policy import ColocationPolicy, Settings


@dataclass(frozen=True, slots=True)
class ReservationSettings:
    """The MIAD reservation in slabs of this device. min <= max <= slabs; factor > 1; decrease >= 1."""

    min_slabs: int
    max_slabs: int
    factor: float
    decrease_slabs: int
    quiet_ns: int


@dataclass(frozen=True, slots=True)
class EffectiveSettings:
    """What holds on one device. Every field but `route` and `unknown_processes` is a plain number."""

    policy: str
    """name of the policy, for logs"""
    device_bytes: int
    """slabs × slab_bytes: what is left of the device after rounding down to whole slabs"""
    slab_bytes: int
    slabs: int
    arena_slabs: int
    """most slabs one tenant can map: slabs, or the protocol's limit"""
    lease_ns: int
    """whole milliseconds"""
    recovery_grace_ns: int
    pause_timeout_ns: int
    cooldown_factor: float
    cooldown_min_ns: int
    cooldown_max_ns: int
    reservation: ReservationSettings
    online_floor_slabs: int
    """offline holds at most slabs - online_floor_slabs"""
    offline_default_bytes: int
    """whole slabs; memory limit of an offline tenant that states none"""
    offline_max_processes: int
    unknown_processes: str
    """Report or Refuse"""
    route: str
    """auto, agent, in-process, patched or launch-gate"""
    max_reclaims_per_minute: int


def settings_for(policy: ColocationPolicy, gpu_bytes: int | None = None) -> EffectiveSettings:
    """The settings of `policy` on a GPU of `gpu_bytes`; None: on the policy's own cpu device.

    Raises PolicyError where the policy describes no such device or does not fit it.
    """
    return settings_from(policy.spec, policy.metadata.name, gpu_bytes)


def settings_from(
    spec: Settings, name: str, gpu_bytes: int | None = None, source: str = ""
) -> EffectiveSettings:
    """Like settings_for, from the part of a spec that policies and nodes share.

    source: what an error names, a file for example; "" names the policy.
    """
    source = source or f"policy {name}"
    memory = spec.memory
    slab_bytes = int(memory.slab_size)
    if gpu_bytes is not None:
        device_bytes = memory.pool.of(gpu_bytes)
        if device_bytes > gpu_bytes:
            text = f"larger than this GPU, which has {format_quantity(gpu_bytes)}"
            raise PolicyError(source, [Problem("spec.memory.pool", str(memory.pool), text)])
    else:
        if spec.cpu_device is None:
            text = "missing: the cpu device needs spec.cpuDevice.memory, 1536Mi for example"
            raise PolicyError(source, [Problem("spec.cpuDevice", "", text)])
        device_bytes = int(spec.cpu_device.memory)
    slabs = device_bytes // slab_bytes
    if not DEVICE_SLABS_MIN <= slabs <= DEVICE_SLABS_MAX:
        text = (
            f"cuts this device of {format_quantity(device_bytes)} into {slabs} slabs; "
            f"{DEVICE_SLABS_MIN} to {DEVICE_SLABS_MAX} are allowed"
        )
        raise PolicyError(source, [Problem("spec.memory.slabSize", str(memory.slab_size), text)])

    def up(share: Share) -> int:
        return -(-share.of(slabs * slab_bytes) // slab_bytes)

    reservation = ReservationSettings(
        min_slabs=max(1, up(memory.reservation.min)),
        max_slabs=max(1, up(memory.reservation.max)),
        factor=float(memory.reservation.factor),
        decrease_slabs=max(1, up(memory.reservation.decrease)),
        quiet_ns=int(memory.reservation.quiet_period),
    )
    floor = up(memory.online_floor)
    default = min(slabs, spec.offline.default_memory.of(slabs * slab_bytes) // slab_bytes)
    problems = _share_problems(spec, slabs, slab_bytes, reservation, floor, default)
    if problems:
        raise PolicyError(source, problems)
    return EffectiveSettings(
        policy=name,
        device_bytes=slabs * slab_bytes,
        slab_bytes=slab_bytes,
        slabs=slabs,
        arena_slabs=min(slabs, ARENA_SLABS_MAX),
        lease_ns=int(spec.compute.lease) // 10**6 * 10**6,
        recovery_grace_ns=int(spec.compute.recovery_grace),
        pause_timeout_ns=int(spec.guardrails.pause_timeout),
        cooldown_factor=float(spec.compute.cooldown.factor),
        cooldown_min_ns=int(spec.compute.cooldown.min),
        cooldown_max_ns=int(spec.compute.cooldown.max),
        reservation=reservation,
        online_floor_slabs=floor,
        offline_default_bytes=default * slab_bytes,
        offline_max_processes=int(spec.offline.max_processes),
        unknown_processes=str(spec.guardrails.unknown_processes.value),
        route=str(spec.compute.route.value),
        max_reclaims_per_minute=int(spec.guardrails.max_reclaims_per_minute),
    )


def _share_problems(
    spec: Settings, slabs: int, slab_bytes: int, reservation: ReservationSettings, floor: int, default: int
) -> list[Problem]:
    """What only shows once percentages and quantities meet a device."""
    memory = spec.memory
    size = f"this device has {format_quantity(slabs * slab_bytes)}"
    found = []
    for name, share, held in (
        ("min", memory.reservation.min, reservation.min_slabs),
        ("max", memory.reservation.max, reservation.max_slabs),
    ):
        if held > slabs:
            found.append(
                Problem(f"spec.memory.reservation.{name}", str(share), f"larger than the device; {size}")
            )
    if reservation.min_slabs > reservation.max_slabs:
        text = f"must not be larger than max ({memory.reservation.max}); {size}"
        found.append(Problem("spec.memory.reservation.min", str(memory.reservation.min), text))
    if floor >= slabs:
        text = f"leaves offline no slab; {size}"
        found.append(Problem("spec.memory.onlineFloor", str(memory.online_floor), text))
    if default < 1:
        text = f"smaller than one slab ({format_quantity(slab_bytes)}); {size}"
        found.append(Problem("spec.offline.defaultMemory", str(spec.offline.default_memory), text))
    return found
