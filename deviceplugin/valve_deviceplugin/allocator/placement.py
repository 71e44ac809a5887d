# SPDX-License-Identifier: Apache-2.0
"""On which GPU a request goes.

Why it exists: the kubelet counts units and knows no GPU; a request must lie on one. Best fit keeps large
holes for large requests, and a GPU with an online tenant is preferred: there offline fills the gaps that the
other GPUs do not have.

Threading model: pure. Callers: units.py; later the DRA driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the allocator sees it. `lent`: GiB that offline may hold in all now; 0 <= lent <= units."""

    id: str
    short: str
    units: int
    lent: int
    online: bool
    """has an online tenant, or a container that holds its seat"""
    numa_node: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    gpu: str
    shortage: int
    """GiB that the GPU lends too little for this request; 0: it fits"""


def choose(units: int, gpus: Sequence[Gpu], used: Mapping[str, int], wished: Mapping[str, int]) -> Choice:
    """The GPU for a request of `units` GiB. gpus: at least one. used: GiB already given away, by GPU.
    wished: GPUs that the request names, with how often; a single one is taken if the request fits there."""
    only = next(iter(wished)) if len(wished) == 1 else None

    def order(gpu: Gpu) -> tuple[bool, bool, bool, int, int, str]:
        left = room(gpu, used) - units
        fits = left >= 0
        # where it fits: least left over; where it does not: least missing
        return (not fits, gpu.id != only, not gpu.online, abs(left), -wished.get(gpu.id, 0), gpu.id)

    def order_short(gpu: Gpu) -> tuple[int, bool, bool, int, str]:
        return (-room(gpu, used), gpu.id != only, not gpu.online, -wished.get(gpu.id, 0), gpu.id)

    best = min(gpus, key=order)
    if room(best, used) < units:
        best = min(gpus, key=order_short)
    return Choice(best.id, max(0, units - max(0, room(best, used))))


def room(gpu: Gpu, used: Mapping[str, int]) -> int:
    """GiB still to be given; negative where the GPU lends less than was given."""
    return gpu.lent - used.get(gpu.id, 0)
