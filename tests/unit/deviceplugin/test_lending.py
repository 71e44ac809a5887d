# SPDX-License-Identifier: Apache-2.0
"""What is lent: a shrink at once, growth when it stands, nothing without news; and what a status says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_deviceplugin.agent_status import reports_of
from valve_deviceplugin.allocator.lending import GIB, Lending, Report
from valve_deviceplugin.errors import AgentError

STAND_S, GRACE_S = 10.0, 30.0


@pytest.mark.parametrize(
    ("description", "samples", "now_s", "expected"),
    [
        ("never heard", [], 0.0, 0),
        ("the first news counts at once", [(0.0, 8)], 0.0, 8),
        ("a shrink counts at once", [(0.0, 8), (1.0, 3)], 1.0, 3),
        ("growth waits", [(0.0, 3), (1.0, 8)], 10.0, 3),
        ("until it stands", [(0.0, 3), (1.0, 8), (10.5, 8)], 10.5, 8),
        ("a dip starts the wait again", [(0.0, 8), (5.0, 2), (6.0, 8), (14.0, 8)], 14.0, 2),
        ("a dip ends", [(0.0, 8), (5.0, 2), (6.0, 8), (15.5, 8)], 15.5, 8),
        ("stairs: each stands by itself",
         [(0.0, 2), (4.0, 5), (8.0, 9), (10.5, 9), (14.5, 9)], 14.5, 9),
        ("stairs: halfway", [(0.0, 2), (4.0, 5), (8.0, 9), (10.5, 9)], 10.5, 5),
        ("silent, within the grace", [(0.0, 8)], 30.0, 8),
        ("silent for longer", [(0.0, 8)], 30.1, 0),
        ("back after a silence: what it said before is forgotten", [(0.0, 2), (40.0, 8)], 40.0, 8),
    ],
)  # fmt: skip
def test_lent(description: str, samples: list[tuple[float, int]], now_s: float, expected: int) -> None:
    lending = Lending(STAND_S, GRACE_S)
    for at_s, units in samples:
        lending.observe(units, at_s)
    assert lending.lent(now_s) == expected, description


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60))
def test_lent_is_the_least_of_the_last_ten_looks(samples: list[int]) -> None:
    """One look a second, so a window of ten seconds holds eleven."""
    lending = Lending(STAND_S, GRACE_S)
    for second, units in enumerate(samples):
        lending.observe(units, float(second))
        assert lending.lent(float(second)) == min(samples[max(0, second - 10) : second + 1])


@pytest.mark.parametrize(
    ("description", "report", "units", "lendable"),
    [
        ("whole GiB", Report("g", 80 * GIB, 24 * GIB, 0), 80, 24),
        ("parts of a GiB are not lent", Report("g", 80 * GIB + 5, 25 * GIB - 1, 0), 80, 24),
        ("online holds more than there is to lend", Report("g", 80 * GIB, -3 * GIB, 1), 80, 0),
        ("never more than there is", Report("g", 8 * GIB, 9 * GIB, 0), 8, 8),
    ],
)
def test_report(description: str, report: Report, units: int, lendable: int) -> None:
    assert (report.units, report.lendable) == (units, lendable), description


def test_the_gpus_of_a_status() -> None:
    gpu = {"id": "GPU-1", "memory_bytes": 80 * GIB, "lendable_bytes": GIB, "online_tenants": 2, "new": 1}
    reports = reports_of({"gpus": [gpu, {**gpu, "id": "GPU-2", "numa_node": 1}]})
    assert reports == [
        Report("GPU-1", 80 * GIB, GIB, 2, None),
        Report("GPU-2", 80 * GIB, GIB, 2, 1),
    ]


@pytest.mark.parametrize(
    "document", [{}, {"gpus": [{"id": "GPU-1"}]}, {"gpus": 3}, {"slabs": {}, "tenants": {}}]
)
def test_a_status_that_is_not_whole_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(AgentError, match="not whole"):
        reports_of(document)
