# SPDX-License-Identifier: Apache-2.0
"""ColocationNode.status: what this node's agent measures, written at a bounded rate.

Why it exists: a thousand agents write to one API server. Each writes its one object when something changed,
at least MIN_S apart, and every HEARTBEAT_S when nothing did, so that silence means something.

Threading model: `status_of` is pure. `Reporter.submit` is called by the server thread and only stores;
a daemon thread writes. Callers: kube/node.py.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from valve_agent.kube.api import Api, KubeError
from valve_api.names import API_VERSION, PLURAL_NODE
from valve_api.node import TENANTS_MAX
from valve_api.quantity import format_quantity

MIN_S = 5.0
HEARTBEAT_S = 30.0
NODES_PATH = f"/apis/{API_VERSION}/{PLURAL_NODE}"
NAME_MAX, TEXT_MAX = 253, 1024


@dataclass(frozen=True, slots=True)
class ConditionValue:
    type: str
    status: bool
    reason: str
    message: str = ""


def conditions_of(
    values: Sequence[ConditionValue],
    before: Sequence[Mapping[str, Any]],
    generation: int,
    now: datetime,
) -> list[dict[str, Any]]:
    """In Kubernetes' form; lastTransitionTime moves only where the status did."""
    known = {entry.get("type"): entry for entry in before}
    found = []
    for value in values:
        status = "True" if value.status else "False"
        old = known.get(value.type)
        same = old is not None and old.get("status") == status and old.get("lastTransitionTime")
        found.append(
            {
                "type": value.type,
                "status": status,
                "reason": value.reason,
                "message": value.message[:4096],
                "observedGeneration": generation,
                "lastTransitionTime": old["lastTransitionTime"] if same and old else stamp(now),
            }
        )
    return found


def stamp(now: datetime) -> str:
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def gpu_of(document: Mapping[str, Any], recovery_s: float) -> dict[str, Any]:
    """One device's status snapshot as a GpuStatus. `recovery_s`: the policy's recoveryGrace."""
    slabs, preempt = document["slabs"], document["preempt_us"]
    route = document["route"] or {}
    each = slabs["bytes_each"]
    reason = paused_reason(document, recovery_s)
    tenants = [
        _tenant(name, tenant, each, not document["offline_paused"])
        for name, tenant in sorted(document["tenants"].items())
    ]
    return {
        "id": document["id"],
        "model": document["model"],
        "memory": format_quantity(slabs["total"] * each),
        "free": format_quantity(max(0, slabs["free"]) * each),
        "reservation": format_quantity(slabs["reservation"] * each),
        "route": route.get("route", "agent"),  # the cpu device has one way: the agent stops processes
        "routeReason": _why_not_stronger(route)[:TEXT_MAX],
        "paused": document["offline_paused"],
        "pausedReason": reason,
        "tenants": tenants[:TENANTS_MAX],
        "preemptLatency": {
            "p50Us": round(preempt["p50"] or 0), "p99Us": round(preempt["p99"] or 0),
            "maxUs": round(preempt["max"] or 0), "samples": preempt["samples"],
        },
        "preemptions": document["gate"]["samples"],
        "reclaims": document["reclaims"]["total"],
        "reclaimed": format_quantity(document["reclaims"]["bytes_in_use"]),
        "unknownProcesses": document["unknown_processes"],
    }  # fmt: skip


def _why_not_stronger(route: Mapping[str, Any]) -> str:
    """`route`: of a snapshot; what it refuses stands in the order of strength."""
    if route.get("route", "agent") == "agent":
        return ""
    if route["wanted"] != "auto":
        return f"the policy asks for {route['wanted']}"
    return "; ".join(f"{name}: {why}" for name, why in route["refused"].items())


def paused_reason(document: Mapping[str, Any], recovery_s: float) -> str:
    """Which of the gate's rules keeps offline off, as far as a snapshot tells."""
    if not document["offline_paused"]:
        return ""
    processes = (process for tenant in document["tenants"].values() for process in tenant["processes"])
    if any(process.get("busy") for process in processes):
        return "busy"
    if document["reclaims"]["in_flight"]:
        return "hold"
    return "recovering" if document["uptime_s"] < recovery_s else "cooldown"


def _tenant(name: str, tenant: Mapping[str, Any], each: int, open_gate: bool) -> dict[str, Any]:
    online = tenant["role"] == "online"
    busy = any(process.get("busy") for process in tenant["processes"])
    return {
        "name": name[:NAME_MAX],
        "workload": tenant["role"],
        "processes": len(tenant["processes"]),
        "memory": format_quantity(tenant["held_slabs"] * each),
        "limit": format_quantity(tenant["limit_slabs"] * each),
        "busy": busy if online else open_gate and bool(tenant["processes"]),
    }


def status_of(
    gpus: Sequence[Mapping[str, Any]], conditions: Sequence[Mapping[str, Any]], generation: int, version: str
) -> dict[str, Any]:
    """The whole status but reportedAt, which the Reporter adds."""
    workloads = [tenant["workload"] for gpu in gpus for tenant in gpu["tenants"]]
    return {
        "observedGeneration": generation,
        "conditions": list(conditions),
        "agentVersion": version,
        "gpus": list(gpus),
        "gpuCount": len(gpus),
        "onlineTenants": workloads.count("online"),
        "offlineTenants": workloads.count("offline"),
        "worstP99Us": max((gpu["preemptLatency"]["p99Us"] for gpu in gpus), default=0),
    }


class Reporter:
    """Writes the last submitted status. Failures are kept in `error`, and the next change or heartbeat
    writes again: nothing queues."""

    def __init__(
        self,
        api: Api,
        node: str,
        *,
        min_s: float = MIN_S,
        heartbeat_s: float = HEARTBEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.error = ""
        self.writes = 0
        self._path = f"{NODES_PATH}/{node}/status"
        self._api = api
        self._min_s = min_s
        self._heartbeat_s = heartbeat_s * random.uniform(0.8, 1.0)
        self._clock = clock
        self._wanted: dict[str, Any] | None = None
        self._written: dict[str, Any] | None = None
        self._written_at = -heartbeat_s
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="valve-report", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, status: dict[str, Any]) -> None:
        """The status as of now. Any thread; never waits."""
        self._wanted = status
        self._wake.set()

    def close(self) -> None:
        """Stop writing. What was submitted last is written once more if the server answers at once."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def due(self, now: float) -> bool:
        """Whether something has to be written now."""
        wanted = self._wanted
        if wanted is None:
            return False
        since = now - self._written_at
        return since >= self._heartbeat_s or (since >= self._min_s and wanted != self._written)

    def _loop(self) -> None:
        while not self._closing:
            self._wake.wait(self._min_s)
            self._wake.clear()
            now = self._clock()
            if self._closing or self.due(now):
                self._write(now)

    def _write(self, now: float) -> None:
        wanted = self._wanted
        if wanted is None:
            return
        self._written_at = now  # also after a failure: a server in trouble is not asked more often
        try:
            body = {"status": {**wanted, "reportedAt": stamp(datetime.now(UTC))}}
            self._api.patch(self._path, body, {"fieldManager": "valve-agent"})
        except KubeError as error:
            self.error = str(error)
            return
        self.error = ""
        self.writes += 1
        self._written = wanted
