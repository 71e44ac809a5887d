# SPDX-License-Identifier: Apache-2.0
"""Seconds of busy and paused time, from the gate's events."""

from __future__ import annotations

import pytest

from valve_agent.usage import Usage

S = 1_000_000_000
Event = tuple[str, int, int]
"""Name, second, connection."""
CASES: list[tuple[str, list[Event], dict[str, float]]] = [
    ("paused from the start", [], {"online_busy": 0.0, "offline_paused": 10.0}),
    ("let go after two seconds", [("resume", 2, 0)], {"online_busy": 0.0, "offline_paused": 2.0}),
    (
        "one request",
        [("resume", 1, 0), ("busy", 3, 7), ("pause", 3, 7), ("idle", 5, 7), ("resume", 6, 0)],
        {"online_busy": 2.0, "offline_paused": 4.0},
    ),
    (
        "two engines that overlap count once",
        [("busy", 1, 7), ("busy", 2, 8), ("idle", 4, 7), ("idle", 6, 8)],
        {"online_busy": 5.0, "offline_paused": 10.0},
    ),
    ("busy still", [("busy", 7, 7)], {"online_busy": 3.0, "offline_paused": 10.0}),
    (
        "told twice",
        [("busy", 7, 7), ("busy", 8, 7), ("idle", 9, 7)],
        {"online_busy": 2.0, "offline_paused": 10.0},
    ),
    ("idle that was never busy", [("idle", 5, 7)], {"online_busy": 0.0, "offline_paused": 10.0}),
    ("resumed twice", [("resume", 2, 0), ("resume", 5, 0)], {"online_busy": 0.0, "offline_paused": 2.0}),
]


@pytest.mark.parametrize(("description", "events", "totals"), CASES, ids=[case[0] for case in CASES])
def test_totals(description: str, events: list[Event], totals: dict[str, float]) -> None:
    usage = Usage(0)
    for name, second, conn in events:
        usage.on_event({"event": name, "t_ns": second * S, "conn": conn})
    assert usage.totals_s(10 * S) == totals


def test_an_engine_that_dies_busy_is_busy_no_more() -> None:
    usage = Usage(0)
    usage.on_event({"event": "busy", "t_ns": 1 * S, "conn": 7})
    usage.engine_gone(7, 3 * S)
    assert usage.totals_s(10 * S)["online_busy"] == 2.0


def test_totals_never_fall() -> None:
    usage = Usage(0)
    usage.on_event({"event": "busy", "t_ns": 5 * S, "conn": 7})
    usage.on_event({"event": "idle", "t_ns": 4 * S, "conn": 7})  # out of order by a hair
    assert usage.totals_s(10 * S)["online_busy"] == 0.0
