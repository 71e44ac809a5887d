# SPDX-License-Identifier: Apache-2.0
"""What the agent knows, as one JSON object: for `valve status`, the metrics and tests.

Why it exists: one snapshot serves every reader, so readers never touch the server thread's state. The
server thread makes it once a second and when somebody asks at the status socket.

Threading model: `snapshot` runs in the server thread; its result is never changed afterwards, so any thread
may read it. Callers: main.py, metrics.py.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from valve_agent.agent import COUNTERS, Agent
from valve_agent.devices.base import DeviceInfo
from valve_agent.gate_stats import BUCKETS_US, GateStats
from valve_agent.identity import credentials_of
from valve_agent.wire import Role

SCHEMA = "valve.io/status/v1"


def document(
    gpus: Sequence[dict[str, Any]],
    rejects: int,
    unusable: Mapping[str, str],
    cluster: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the status socket answers. `gpus`: a snapshot of every device; the fields of an only one also
    stand at the top. `unusable`: devices that this machine has and the agent cannot share, and why."""
    only = gpus[0] if len(gpus) == 1 else {}
    return {
        "schema": SCHEMA, "pid": os.getpid(), **only, "gpus": list(gpus), "rejects": rejects,
        "unusable": dict(unusable), "cluster": cluster,
    }  # fmt: skip


def snapshot(
    agent: Agent,
    info: DeviceInfo,
    stats: GateStats,
    *,
    huge_pages: bool,
    unknown_processes: int,
    now_ns: int,
) -> dict[str, Any]:
    """Of one device, JSON-ready. Sizes in bytes, times in seconds or microseconds as named."""
    pool, registry = agent.pool, agent.registry
    tenants: dict[str, dict[str, Any]] = {}
    for tenant in registry.tenants.values():
        tenants[tenant.name] = {
            "role": tenant.role.name.lower(), "labels": dict(tenant.labels),
            "limit_slabs": tenant.limit_slabs, "held_slabs": 0, "want_slabs": 0,
            "launcher": tenant.launcher_pid if tenant.launcher is not None else None, "processes": [],
            "decode_gap_ns": 0, **dict.fromkeys(COUNTERS, 0),
        }  # fmt: skip
    for name, counters in agent.retired.items():
        entry = tenants.get(name)
        if entry is not None:
            for counter in COUNTERS:
                entry[counter] += counters[counter]
    for process in registry.processes.values():
        entry = tenants[process.tenant.name]
        state: dict[str, Any] = {
            "pid": process.pid,
            "comm": process.comm,
            "connected": process.link is not None,
        }
        if process.link is not None:
            page = process.link.page
            for counter in COUNTERS:
                entry[counter] += getattr(page, counter)
            if process.tenant.role == Role.ONLINE:
                state["busy"] = page.busy
                entry["decode_gap_ns"] = max(entry["decode_gap_ns"], page.decode_gap_ns)
        if process.route is not None:
            state["route"] = process.route
        if process.memory is not None:
            holder = process.memory.holder
            state["held_slabs"] = holder.count
            state["resident_bytes"] = agent.memory.resident_bytes(process.memory.arena)
            entry["held_slabs"] += holder.count
            entry["want_slabs"] += holder.want
        entry["processes"].append(state)
    latency = sorted(stats.latency_ns)
    offline_held = sum(entry["held_slabs"] for entry in tenants.values() if entry["role"] == "offline")
    floor = agent.settings.online_floor_slabs
    lendable = lendable_slabs(pool.slabs, pool.free, pool.reservation.slabs, floor, offline_held)
    return {
        "id": info.uuid,
        "model": info.name,
        "numa_node": info.numa_node,
        "memory_bytes": pool.slabs * pool.slab_bytes,
        "lendable_bytes": lendable * pool.slab_bytes,
        "online_tenants": sum(entry["role"] == "online" for entry in tenants.values()),
        "policy": agent.settings.policy,
        "device": agent.device.name.lower(),
        "uptime_s": round((now_ns - agent.started_ns) / 1e9, 3),
        "huge_pages": huge_pages,
        "growth_stopped": pool.growth_stopped,
        "offline_paused": agent.paused,
        "route": dict(agent.route) or None,
        "usage_s": agent.usage.totals_s(now_ns),
        "slabs": {
            "bytes_each": pool.slab_bytes, "total": pool.slabs, "free": pool.free,
            "reservation": pool.reservation.slabs, "online_floor": floor,
        },
        "tenants": tenants,
        "reclaims": {
            "total": pool.totals.reclaims,
            "bytes": pool.totals.reclaimed_slabs * pool.slab_bytes,
            "bytes_in_use": pool.totals.reclaimed_in_use_slabs * pool.slab_bytes,
            "requests_harmed": pool.totals.requests_harmed,
            "in_flight": pool.reclaiming,
        },
        "unknown_processes": unknown_processes,
        "killed": pool.totals.killed,
        "preempt_us": {
            "p50": _at(latency, 0.5), "p99": _at(latency, 0.99), "max": _at(latency, 1.0),
            "samples": len(latency),
        },
        "gate": stats.counters,
        "preempt_buckets_us": dict(zip([*map(str, BUCKETS_US), "inf"], stats.buckets, strict=True)),
    }  # fmt: skip


def lendable_slabs(total: int, free: int, reservation: int, floor: int, offline_held: int) -> int:
    """What offline tenants may have together, what they hold included; below 0 in a shortfall."""
    return min(total - floor, free - reservation + offline_held)


def _at(ordered_ns: list[int], share: float) -> float | None:
    if not ordered_ns:
        return None
    return ordered_ns[min(len(ordered_ns) - 1, int(share * len(ordered_ns)))] / 1000


class StatusSocket:
    """Whoever connects gets the snapshot as JSON and the end of the file; who may not, the end at once."""

    def __init__(self, listener: socket.socket, may_ask: Callable[[int], bool]) -> None:
        """may_ask(pid): whether that process may read it."""
        self._listener = listener
        self._may_ask = may_ask
        self._listener.setblocking(False)

    def fileno(self) -> int:
        return self._listener.fileno()

    def answer(self, document: Callable[[], dict[str, Any]]) -> None:
        """Serve one waiting client. What does not fit into its socket buffer is cut off; a client that gets
        no whole JSON object asks again."""
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        with client:
            pid, _uid = credentials_of(client)
            if not self._may_ask(pid):
                return
            data = json.dumps(document()).encode()
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(data))
            try:
                client.send(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()
