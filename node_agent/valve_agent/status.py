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
from collections.abc import Callable
from typing import Any

from valve_agent.agent import COUNTERS, Agent
from valve_agent.gate_stats import BUCKETS_US, GateStats
from valve_agent.identity import credentials_of
from valve_agent.wire import Role

SCHEMA = "valve.io/status/v1"


def snapshot(agent: Agent, stats: GateStats, *, huge_pages: bool, now_ns: int) -> dict[str, Any]:
    """JSON-ready. Sizes in bytes, times in seconds or microseconds as named."""
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
    return {
        "schema": SCHEMA,
        "pid": os.getpid(),
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
            "reservation": pool.reservation.slabs, "online_floor": agent.settings.online_floor_slabs,
        },
        "tenants": tenants,
        "reclaims": {
            "total": pool.totals.reclaims,
            "bytes": pool.totals.reclaimed_slabs * pool.slab_bytes,
            "bytes_in_use": pool.totals.reclaimed_in_use_slabs * pool.slab_bytes,
            "requests_harmed": pool.totals.requests_harmed,
            "in_flight": pool.reclaiming,
        },
        "rejects": agent.rejects,
        "killed": pool.totals.killed,
        "preempt_us": {
            "p50": _at(latency, 0.5), "p99": _at(latency, 0.99), "max": _at(latency, 1.0),
            "samples": len(latency),
        },
        "gate": stats.counters,
        "preempt_buckets_us": dict(zip([*map(str, BUCKETS_US), "inf"], stats.buckets, strict=True)),
    }  # fmt: skip


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
