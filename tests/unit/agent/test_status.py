# SPDX-License-Identifier: Apache-2.0
"""The status document: what is lent, one device and several."""

from __future__ import annotations

import pytest

from valve_agent.status import document, lendable_slabs


@pytest.mark.parametrize(
    ("description", "free", "reservation", "floor", "offline_held", "lendable"),
    [
        ("all but the reservation", 16, 2, 0, 0, 14),
        ("the floor, where it is more", 16, 2, 6, 0, 10),
        ("less what online holds (6)", 10, 2, 0, 0, 8),
        ("what offline holds is lent already", 6, 2, 0, 4, 8),
        ("the floor counts online's share", 10, 2, 8, 0, 8),
        ("a shortfall shows", 0, 4, 0, 0, -4),
    ],
)
def test_what_is_lent(
    description: str, free: int, reservation: int, floor: int, offline_held: int, lendable: int
) -> None:
    assert lendable_slabs(16, free, reservation, floor, offline_held) == lendable, description


def test_the_fields_of_an_only_device_stand_at_the_top_too() -> None:
    gpu = {"id": "cpu", "slabs": {"total": 3}}
    one = document([gpu], 2, {}, None)
    assert (one["slabs"], one["gpus"], one["rejects"]) == ({"total": 3}, [gpu], 2)
    several = document([gpu, {**gpu, "id": "b"}], 0, {"GPU 2": "lost"}, None)
    assert "slabs" not in several
    assert [entry["id"] for entry in several["gpus"]] == ["cpu", "b"]
    assert several["unusable"] == {"GPU 2": "lost"}
