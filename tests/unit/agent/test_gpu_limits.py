# SPDX-License-Identifier: Apache-2.0
"""Who is over a GPU memory limit, and what the others of a tenant may still allocate."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from valve_agent.devices.base import DeviceError
from valve_agent.gpu_limits import LOOKS, GpuLimits, Use, is_around, over_limit
from valve_agent.wire import Role

MIB = 1 << 20
SLAB = 32 * MIB
CONTEXT = 500 * MIB

#            what                            uses: (reported, seen, held) in MiB     limit  over
OVER = [
    pytest.param([(0, 0, 0)], 1024, 0, id="nothing"),
    pytest.param([(512, 0, 512)], 1024, 0, id="arena and allocations fill it"),
    pytest.param([(540, 0, 512)], 1024, 0, id="less than a slab over: rounding"),
    pytest.param([(600, 0, 512)], 1024, 88, id="reported over"),
    pytest.param([(600, 0, 0), (0, 0, 512)], 1024, 88, id="two processes together"),
    pytest.param([(100, 600, 0)], 1024, 0, id="its context is not held against it"),
    pytest.param([(0, 1800, 0)], 1024, 276, id="NVML sees what nobody reported"),
    pytest.param([(0, 1800, 512)], 1024, 276, id="granted slabs may be part of what NVML sees"),
    pytest.param([(900, 1000, 0)], 1024, 0, id="NVML and the report agree"),
]


@pytest.mark.parametrize(("uses", "limit", "over"), OVER)
def test_over_limit(uses: list[tuple[int, int, int]], limit: int, over: int) -> None:
    made = [Use(*(value * MIB for value in use)) for use in uses]
    assert over_limit(made, limit * MIB, SLAB, CONTEXT) == over * MIB


#                                             uses                    limit  around
AROUND = [
    pytest.param([(600, 0, 512)], 1024, False, id="granted while it allocated"),
    pytest.param([(1100, 0, 0)], 1024, True, id="allocated more than all"),
    pytest.param([(100, 800, 0)], 1024, True, id="memory that nobody reported"),
    pytest.param([(100, 600, 0)], 1024, False, id="its context"),
]


@pytest.mark.parametrize(("uses", "limit", "around"), AROUND)
def test_past_libvalve_or_not(uses: list[tuple[int, int, int]], limit: int, around: bool) -> None:
    made = [Use(*(value * MIB for value in use)) for use in uses]
    assert is_around(made, limit * MIB, SLAB, CONTEXT) is around


class Process(SimpleNamespace):
    __hash__ = object.__hash__


class Rig:
    """One offline tenant of 1 GiB and its processes, an online tenant without any limit."""

    def __init__(self) -> None:
        self.tenant = SimpleNamespace(id=1, role=Role.OFFLINE, limit_slabs=32)
        self.chat = SimpleNamespace(id=2, role=Role.ONLINE, limit_slabs=1000)
        self.processes: dict[int, Any] = {}
        self.seen: dict[int, int] = {}
        self.ended: list[int] = []
        registry: Any = SimpleNamespace(tenants={1: self.tenant, 2: self.chat}, processes=self.processes)
        self.limits = GpuLimits(
            registry,
            SLAB,
            self.nvml,
            lambda process, why: self.ended.append(process.pid),
            context_bytes=CONTEXT,
        )
        self.broken = False

    def nvml(self) -> Mapping[int, int]:
        if self.broken:
            raise DeviceError("NVML is gone")
        return self.seen

    def add(self, pid: int, direct: int = 0, held: int = 0, tenant: Any = None) -> Any:
        page = SimpleNamespace(direct_bytes=direct * MIB, memory_limit_bytes=0)
        holder = SimpleNamespace(count=held, limit=32)
        process = Process(
            pid=pid, tenant=tenant or self.tenant, link=SimpleNamespace(page=page),
            memory=SimpleNamespace(holder=holder), page=page, holder=holder,
        )  # fmt: skip
        self.processes[pid] = process
        return process


def test_processes_of_a_tenant_share_its_limit() -> None:
    rig = Rig()
    one, two = rig.add(10, direct=200, held=4), rig.add(11, direct=100)
    online = rig.add(12, direct=5000, tenant=rig.chat)
    rig.limits.look()
    assert one.page.memory_limit_bytes == (1024 - 100) * MIB
    assert two.page.memory_limit_bytes == (1024 - 200 - 4 * 32) * MIB
    assert one.holder.limit == two.holder.limit == 32 - 10, "300 MiB are 10 slabs that cannot be granted"
    assert online.page.memory_limit_bytes == 0, "online has none"
    assert rig.limits.first(rig.tenant) == (1024 - 300 - 128) * MIB  # type: ignore[arg-type]


def test_a_full_tenant_gets_the_smallest_limit_not_none() -> None:
    rig = Rig()
    rig.add(10, direct=2000)
    late = rig.add(11)
    rig.limits.look()
    assert late.page.memory_limit_bytes == 1


def test_who_stays_over_is_ended_and_who_comes_back_is_not() -> None:
    rig = Rig()
    rig.add(10, held=2)
    rig.add(11)
    rig.seen = {11: 4096 * MIB}
    for _ in range(LOOKS - 1):
        rig.limits.look()
    rig.seen = {}
    rig.limits.look()
    assert rig.ended == []
    rig.seen = {11: 4096 * MIB}
    for _ in range(LOOKS):
        rig.limits.look()
    assert rig.ended == [11]


def test_without_nvml_nobody_is_judged_but_limits_hold() -> None:
    rig = Rig()
    one = rig.add(10, direct=9000)
    rig.broken = True
    for _ in range(LOOKS + 1):
        with pytest.raises(DeviceError):
            rig.limits.look()
    assert rig.ended == []
    assert one.page.memory_limit_bytes == 1024 * MIB
