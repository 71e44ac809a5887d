# SPDX-License-Identifier: Apache-2.0
"""The status an agent writes: what is in it, and how seldom it is written."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from valve_agent.kube.api import ApiUnavailable
from valve_agent.kube.report import ConditionValue, Reporter, conditions_of, gpu_of, paused_reason, status_of
from valve_api.node import NodeStatus

NOW = datetime(2026, 11, 21, 14, 0, tzinfo=UTC)


def document(**changes: Any) -> dict[str, Any]:
    process = {"pid": 1, "busy": True}
    tenants = {
        "serve/chat": {"role": "online", "held_slabs": 2, "limit_slabs": 8, "processes": [process]},
        "batch/job": {"role": "offline", "held_slabs": 4, "limit_slabs": 6, "processes": [{"pid": 2}]},
        "batch/new": {"role": "offline", "held_slabs": 0, "limit_slabs": 6, "processes": []},
    }
    return {
        "id": "GPU-1", "model": "NVIDIA Fake GPU", "device": "nvidia", "uptime_s": 100.0,
        "offline_paused": True, "tenants": tenants,
        "slabs": {"bytes_each": 32 << 20, "total": 8, "free": 2, "reservation": 1},
        "preempt_us": {"p50": 120.4, "p99": 810.6, "max": 999.0, "samples": 9}, "gate": {"samples": 9},
        "reclaims": {"total": 3, "bytes_in_use": 64 << 20, "in_flight": False},
        "route": {"route": "launch-gate", "wanted": "auto", "refused": {"agent": "w" * 2000}},
        "unknown_processes": 2, **changes,
    }  # fmt: skip


def test_what_is_reported_is_what_the_crd_takes() -> None:
    gpu = gpu_of(document(), 2.0)
    conditions = conditions_of([ConditionValue("Ready", True, "Following")], [], 7, NOW)
    status = NodeStatus.model_validate(status_of([gpu], conditions, 7, "0.1.0"))
    (one,) = status.gpus
    assert (status.gpu_count, status.online_tenants, status.offline_tenants) == (1, 1, 2)
    assert (status.worst_p99_us, one.preempt_latency.p50_us, one.preemptions) == (811, 120, 9)
    states = {tenant.name: (tenant.processes, tenant.busy) for tenant in one.tenants}
    assert states == {"serve/chat": (1, True), "batch/job": (1, False), "batch/new": (0, False)}
    assert str(one.free) == "64Mi"
    assert one.unknown_processes == 2
    assert one.route_reason.startswith("agent: www")
    assert (one.id, one.model, one.route, len(one.route_reason)) == (
        "GPU-1",
        "NVIDIA Fake GPU",
        "launch-gate",
        1024,
    )


@pytest.mark.parametrize(
    ("description", "route", "reason"),
    [
        ("a device with one way", None, ""),
        ("the strongest", {"route": "agent", "wanted": "auto", "refused": {"patched": "no patch"}}, ""),
        ("asked for", {"route": "launch-gate", "wanted": "launch-gate", "refused": {}},
         "the policy asks for launch-gate"),
        ("the others do not work",
         {"route": "launch-gate", "wanted": "auto", "refused": {"agent": "0x1b", "patched": "0x23"}},
         "agent: 0x1b; patched: 0x23"),
    ],
)  # fmt: skip
def test_why_not_a_stronger_route(description: str, route: dict[str, Any] | None, reason: str) -> None:
    gpu = gpu_of(document(route=route), 2.0)
    assert (gpu["route"], gpu["routeReason"]) == ((route or {"route": "agent"})["route"], reason)


@pytest.mark.parametrize(
    ("description", "changes", "reason"),
    [
        ("it runs", {"offline_paused": False}, ""),
        ("online has a request", {}, "busy"),
        ("a reclaim", {"tenants": {}, "reclaims": {"in_flight": True}}, "hold"),
        ("just started", {"tenants": {}, "uptime_s": 0.5}, "recovering"),
        ("nothing else is left", {"tenants": {}}, "cooldown"),
    ],
)
def test_why_offline_is_paused(description: str, changes: dict[str, Any], reason: str) -> None:
    assert paused_reason(document(**changes), 2.0) == reason


def test_a_condition_keeps_its_time_while_it_does_not_change() -> None:
    first = conditions_of([ConditionValue("Ready", True, "Following")], [], 1, NOW)
    later = NOW + timedelta(minutes=5)
    second = conditions_of([ConditionValue("Ready", True, "Other", "words")], first, 2, later)
    assert second[0]["lastTransitionTime"] == first[0]["lastTransitionTime"] == "2026-11-21T14:00:00Z"
    assert (second[0]["observedGeneration"], second[0]["reason"]) == (2, "Other")
    third = conditions_of([ConditionValue("Ready", False, "Refused")], second, 2, later)
    assert third[0]["lastTransitionTime"] == "2026-11-21T14:05:00Z"


class Server:
    """Stands for an Api: what is written, or trouble."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.trouble = False
        self.wrote = threading.Event()

    def patch(self, path: str, body: dict[str, Any], query: Any = None) -> dict[str, Any]:
        if self.trouble:
            raise ApiUnavailable("away")
        assert path == "/apis/valve.io/v1alpha1/colocationnodes/n1/status"
        self.bodies.append(body["status"])
        self.wrote.set()
        return {}


def test_the_rate_is_bounded_and_silence_means_something() -> None:
    reporter = Reporter(Server(), "n1", min_s=5, heartbeat_s=30)  # type: ignore[arg-type]
    assert not reporter.due(0), "nothing was submitted"
    reporter.submit({"a": 1})
    assert reporter.due(0)
    reporter._write(0.0)
    assert not reporter.due(29 * 0.8), "unchanged"
    assert reporter.due(30), "the heartbeat"
    reporter.submit({"a": 2})
    assert not reporter.due(4.9)
    assert reporter.due(5)


def test_a_failed_write_is_tried_again_no_sooner_than_any_other() -> None:
    server = Server()
    reporter = Reporter(server, "n1", min_s=5, heartbeat_s=30)  # type: ignore[arg-type]
    reporter.submit({"a": 1})
    server.trouble = True
    reporter._write(0.0)
    assert reporter.error == "away"
    assert not reporter.due(4.9)
    assert reporter.due(5.0)
    server.trouble = False
    reporter._write(5.0)
    assert (reporter.error, reporter.writes, server.bodies[0]["a"]) == ("", 1, 1)


def test_the_thread_writes_and_ends() -> None:
    server = Server()
    reporter = Reporter(server, "n1", min_s=0.01, heartbeat_s=30)  # type: ignore[arg-type]
    reporter.start()
    reporter.submit({"a": 1})
    assert server.wrote.wait(30)
    reporter.close()
    assert server.bodies[-1]["a"] == 1
    assert server.bodies[-1]["reportedAt"].endswith("Z")
