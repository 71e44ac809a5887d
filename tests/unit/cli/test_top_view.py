# SPDX-License-Identifier: Apache-2.0
"""One machine's status and a cluster's objects become the same picture."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from valve_cli.top.screen import BAR_CELLS, cells_of, render
from valve_cli.top.view import Screen, from_node, from_status

MIB = 1 << 20


def tenant(role: str, held: int, tokens: int = 0, busy: bool | None = None) -> dict[str, Any]:
    process: dict[str, Any] = {"pid": 1, "comm": "python", "connected": True}
    if busy is not None:
        process["busy"] = busy
    return {
        "role": role, "limit_slabs": 40, "held_slabs": held, "want_slabs": held, "processes": [process],
        "tokens": tokens,
    }  # fmt: skip


def status(paused: bool, tenants: dict[str, Any], more: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    gpu = {
        "id": "cpu", "policy": "inference", "device": "cpu", "offline_paused": paused,
        "slabs": {"bytes_each": 32 * MIB, "total": 64, "free": 20, "reservation": 8},
        "preempt_us": {"p50": 120.0, "p99": 480.5, "samples": 7}, "gate": {"pauses": 9},
        "reclaims": {"total": 3}, "tenants": tenants,
    }  # fmt: skip
    return {"pid": 1, "gpus": [gpu, *more], "unusable": {}}


NODE: dict[str, Any] = {
    "metadata": {"name": "node-1"},
    "spec": {"policy": {"name": "inference"}},
    "status": {
        "conditions": [{"type": "Ready", "status": "True"}],
        "gpus": [
            {
                "id": "GPU-1", "memory": "80Gi", "free": "20Gi", "reservation": "4Gi", "paused": True,
                "pausedReason": "busy", "preemptions": 5, "reclaims": 1,
                "preemptLatency": {"p50Us": 200, "p99Us": 700, "samples": 5},
                "tenants": [
                    {"name": "batch/job", "workload": "offline", "processes": 1, "memory": "20Gi",
                     "limit": "24Gi", "busy": False},
                    {"name": "serve/vllm", "workload": "online", "processes": 2, "memory": "40Gi",
                     "limit": "80Gi", "busy": True},
                ],
            }
        ],
    },
}  # fmt: skip


def text_of(screen: Screen, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(screen))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_machine() -> None:
    now = status(True, {"chat": tenant("online", 24, 900, busy=True), "batch": tenant("offline", 20, 5000)})
    earlier = status(False, {"batch": tenant("offline", 20, 4000)})
    (view,) = from_status(now, "host", earlier, 2.0)
    chat, batch = view.tenants
    assert (chat.name, chat.state, chat.tokens_per_s) == ("chat", "busy", None), "it was not there before"
    assert (batch.name, batch.state, batch.tokens_per_s) == ("batch", "paused", 500.0)
    assert (view.memory_bytes, view.free_bytes, batch.memory_bytes) == (2048 * MIB, 640 * MIB, 640 * MIB)
    assert view.why == "chat busy"


def test_a_cluster() -> None:
    (view,), problems = from_node(NODE)
    assert problems == []
    assert [(t.name, t.state) for t in view.tenants] == [("serve/vllm", "busy"), ("batch/job", "paused")]
    assert (view.node, view.device, view.p99_us, view.reclaims) == ("node-1", "GPU-1", 700, 1)


@pytest.mark.parametrize(
    ("why", "tenants", "states"),
    [
        ("offline runs while online idles", {"a": tenant("online", 1, busy=False)}, ["idle"]),
        ("a tenant without processes waits", {"a": {**tenant("offline", 0), "processes": []}}, ["waiting"]),
        ("offline that may compute", {"a": tenant("offline", 1)}, ["running"]),
    ],
)
def test_states(why: str, tenants: dict[str, Any], states: list[str]) -> None:
    (view,) = from_status(status(False, tenants), "host")
    assert [t.state for t in view.tenants] == states


@pytest.mark.parametrize(
    ("why", "part", "sentence"),
    [
        ("never reported", {}, "node-1: its agent has not reported yet"),
        (
            "not ready",
            {"conditions": [{"type": "Ready", "status": "False", "message": "no settings yet"}]},
            "node-1: no settings yet",
        ),
        (
            "degraded",
            {
                "conditions": [
                    {"type": "Ready", "status": "True"},
                    {"type": "Degraded", "status": "True", "reason": "SmallPages"},
                ]
            },
            "node-1: SmallPages",
        ),
    ],
)
def test_what_is_wrong_with_a_node_is_said(why: str, part: dict[str, Any], sentence: str) -> None:
    devices, problems = from_node({**NODE, "status": part})
    assert devices == []
    assert problems == [sentence]
    assert sentence in text_of(Screen((), tuple(problems)))


def test_what_a_person_sees() -> None:
    devices, _ = from_node(NODE)
    text = text_of(Screen(tuple(devices)))
    for part in ("node-1 · GPU-1 · policy inference", "offline paused (busy)", "p99 700 µs", "serve/vllm",
                 "online 40Gi", "kept for online 4Gi", "free 16Gi", "of 80Gi"):  # fmt: skip
        assert part in text
    assert "No devices: apply a ColocationPolicy" in text_of(Screen(()))


def test_json_says_the_same() -> None:
    devices, _ = from_node(NODE)
    document = json.loads(json.dumps(Screen(tuple(devices)).as_json()))
    assert document["schema"] == "valve.io/top/v1"
    assert document["devices"][0]["tenants"][0]["memory_bytes"] == 40 << 30


@given(st.lists(st.integers(0, 1 << 50), min_size=1, max_size=8))
def test_the_bar_is_always_full_and_shows_whatever_there_is(sizes: list[int]) -> None:
    cells = cells_of(sizes)
    assert sum(cells) == BAR_CELLS
    assert all((count > 0) == (size > 0) for count, size in zip(cells[:-1], sizes[:-1], strict=True))
    assert min(cells) >= 0
