# SPDX-License-Identifier: Apache-2.0
"""What `valve top` shows, whatever it was read from: devices and their tenants.

Why it exists: one machine answers with a status document, a cluster with ColocationNode objects; people and
`-o json` get the same picture of both.

Threading model: immutable values. Callers: top/main.py, top/screen.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from valve_api.errors import UnitError
from valve_api.quantity import Quantity


@dataclass(frozen=True, slots=True)
class TenantView:
    name: str
    workload: str
    """online or offline"""
    processes: int
    memory_bytes: int
    limit_bytes: int
    busy: bool
    """Online: a request is in it. Offline: it may compute."""
    tokens_per_s: float | None = None
    """None where the source has no rate."""

    @property
    def state(self) -> str:
        if self.processes == 0:
            return "waiting"
        if self.workload == "online":
            return "busy" if self.busy else "idle"
        return "running" if self.busy else "paused"


@dataclass(frozen=True, slots=True)
class DeviceView:
    node: str
    device: str
    policy: str
    memory_bytes: int
    free_bytes: int
    reservation_bytes: int
    paused: bool
    why: str
    """Why offline is paused; empty if it runs or nobody says."""
    p50_us: float | None
    p99_us: float | None
    preemptions: int
    reclaims: int
    tenants: tuple[TenantView, ...]

    def held_bytes(self, workload: str) -> int:
        return sum(tenant.memory_bytes for tenant in self.tenants if tenant.workload == workload)


@dataclass(frozen=True, slots=True)
class Screen:
    """One moment. `problems`: sentences about what could not be read."""

    devices: tuple[DeviceView, ...]
    problems: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"schema": "valve.io/top/v1", **asdict(self)}


def from_status(
    status: Mapping[str, Any], node: str, before: Mapping[str, Any] | None = None, elapsed_s: float = 0.0
) -> tuple[DeviceView, ...]:
    """One machine's devices. `before`: its status `elapsed_s` earlier, for rates."""
    earlier = {gpu["id"]: gpu for gpu in before["gpus"]} if before is not None else {}
    return tuple(_of_snapshot(gpu, node, earlier.get(gpu["id"]), elapsed_s) for gpu in status["gpus"])


def _of_snapshot(
    status: Mapping[str, Any], node: str, before: Mapping[str, Any] | None, elapsed_s: float
) -> DeviceView:
    slabs, preempt = status["slabs"], status["preempt_us"]
    each, paused = slabs["bytes_each"], bool(status["offline_paused"])
    tenants = []
    for name, tenant in sorted(status["tenants"].items()):
        online = tenant["role"] == "online"
        rate = None
        if before is not None and elapsed_s > 0 and name in before["tenants"]:
            rate = max(0, tenant["tokens"] - before["tenants"][name]["tokens"]) / elapsed_s
        busy = any(process.get("busy") for process in tenant["processes"]) if online else not paused
        held, limit = tenant["held_slabs"] * each, tenant["limit_slabs"] * each
        tenants.append(TenantView(name, tenant["role"], len(tenant["processes"]), held, limit, busy, rate))
    return DeviceView(
        node=node,
        device=status["id"],
        policy=status["policy"],
        memory_bytes=slabs["total"] * each,
        free_bytes=max(0, slabs["free"]) * each,
        reservation_bytes=slabs["reservation"] * each,
        paused=paused,
        why=_why_paused(paused, tenants),
        p50_us=preempt["p50"],
        p99_us=preempt["p99"],
        preemptions=status["gate"]["pauses"],
        reclaims=status["reclaims"]["total"],
        tenants=_ordered(tenants),
    )


def from_node(node: Mapping[str, Any]) -> tuple[list[DeviceView], list[str]]:
    """The devices of one ColocationNode as the API server sends it, and what is wrong with it."""
    name = node["metadata"]["name"]
    status = node.get("status") or {}
    problems = []
    conditions = {entry["type"]: entry for entry in status.get("conditions", [])}
    ready = conditions.get("Ready")
    if ready is None:
        problems.append(f"{name}: its agent has not reported yet")
    elif ready["status"] != "True":
        problems.append(f"{name}: {ready.get('message') or ready.get('reason') or 'not ready'}")
    degraded = conditions.get("Degraded")
    if degraded is not None and degraded["status"] == "True":
        problems.append(f"{name}: {degraded.get('message') or degraded.get('reason')}")
    policy = node.get("spec", {}).get("policy", {}).get("name", "")
    return [_of_gpu(gpu, name, policy) for gpu in status.get("gpus", [])], problems


def _of_gpu(gpu: Mapping[str, Any], node: str, policy: str) -> DeviceView:
    tenants = [
        TenantView(
            tenant["name"], tenant["workload"], tenant.get("processes", 0), _bytes(tenant.get("memory")),
            _bytes(tenant.get("limit")), bool(tenant.get("busy", False)),
        )
        for tenant in gpu.get("tenants", [])
    ]  # fmt: skip
    latency = gpu.get("preemptLatency") or {}
    measured = latency.get("samples", 0) > 0
    return DeviceView(
        node=node,
        device=gpu["id"],
        policy=policy,
        memory_bytes=_bytes(gpu.get("memory")),
        free_bytes=_bytes(gpu.get("free")),
        reservation_bytes=_bytes(gpu.get("reservation")),
        paused=bool(gpu.get("paused", False)),
        why=gpu.get("pausedReason", ""),
        p50_us=latency.get("p50Us") if measured else None,
        p99_us=latency.get("p99Us") if measured else None,
        preemptions=gpu.get("preemptions", 0),
        reclaims=gpu.get("reclaims", 0),
        tenants=_ordered(tenants),
    )


def _why_paused(paused: bool, tenants: Iterable[TenantView]) -> str:
    if not paused:
        return ""
    busy = [tenant.name for tenant in tenants if tenant.workload == "online" and tenant.busy]
    return f"{', '.join(busy)} busy" if busy else "cooldown, a reclaim, or the agent has just started"


def _ordered(tenants: Iterable[TenantView]) -> tuple[TenantView, ...]:
    """Online first; then by name, so that rows stay where they are."""
    return tuple(sorted(tenants, key=lambda tenant: (tenant.workload != "online", tenant.name)))


def _bytes(text: Any) -> int:
    if text is None:
        return 0
    try:
        return int(Quantity(str(text)))
    except UnitError:  # an agent of another version; better a zero in one cell than no table
        return 0
