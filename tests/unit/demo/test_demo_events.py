# SPDX-License-Identifier: Apache-2.0
"""The agent's event log as the demo reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from valve_cli.demo.errors import MeasurementError
from valve_cli.demo.events import Timeline, parse, spans_of


def event(name: str, t_ns: int, **fields: Any) -> bytes:
    return json.dumps({"schema": "valve.io/events/v1", "t_ns": t_ns, "event": name, **fields}).encode()


def test_what_the_report_needs_is_kept_and_the_rest_left_out() -> None:
    timeline = Timeline()
    for line in (
        event("start", 1),
        event("busy", 10),
        event("pause", 12, latency_us=150.5, stop_us=90, targets=1),
        event(
            "reclaim",
            15,
            slabs=3,
            bytes=6 << 20,
            bytes_in_use=4 << 20,
            victims={"offline": 3},
            requests_harmed=2,
            duration_us=900,
        ),
        event("pool", 16, free=2, reservation=4, held={"online": 8, "offline": 90}),
        event("idle", 30),
        event("resume", 40),
        event("pause", 50, latency_us=None),
    ):
        timeline.add(parse(line))
    assert timeline.pauses == [(12, 150.5), (50, None)]
    assert timeline.paused
    assert timeline.paused_spans(60) == [(12, 40), (50, 60)]
    assert timeline.busy_spans(60) == [(10, 30)]
    assert (timeline.reclaims[0].bytes_in_use, timeline.reclaims[0].requests_harmed) == (4 << 20, 2)
    assert timeline.pool[0].held == {"online": 8, "offline": 90}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{broken", "no JSON"),
        (b'{"schema": "valve.io/events/v9", "t_ns": 1, "event": "pause"}', "this demo reads"),
        (event("pause", 1), "has no field 'latency_us'"),
    ],
    ids=["not JSON", "another schema", "a field is missing"],
)
def test_a_log_that_does_not_fit_is_refused(line: bytes, says: str) -> None:
    timeline = Timeline()
    with pytest.raises(MeasurementError, match=says):
        timeline.add(parse(line))


@pytest.mark.parametrize(
    ("begins", "ends", "expected"),
    [
        ([1, 5], [3, 8], [(1, 3), (5, 8)]),
        ([1, 2], [3], [(1, 3)]),
        ([1], [], [(1, 10)]),
        ([5], [3, 7], [(5, 7)]),
    ],
    ids=["two spans", "a begin within a span", "still open at the end", "an end without a begin"],
)
def test_spans(begins: list[int], ends: list[int], expected: list[tuple[int, int]]) -> None:
    assert spans_of(begins, ends, 10) == expected
