# SPDX-License-Identifier: Apache-2.0
"""What a part found, and the JSON document it becomes; percentiles.

Threading model: values. Callers: every part, qualify.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "valve.io/qualification/v1"


@dataclass
class Found:
    """What one part found. `answer` is one sentence for people; `figures` has units in its names."""

    verdict: str
    """`pass`, `fail`. `finding`: a question without a right answer, answered. `skipped`: something is
    missing, the answer says what. `error`: the part itself broke, or did not end in time."""
    answer: str
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    expected_xids: list[int] = field(default_factory=list)
    """Xids that the part provokes on purpose."""


class Skip(Exception):
    """The part cannot be done here; the message says what is missing."""


def spread(values_ns: Sequence[float]) -> dict[str, float]:
    """p50, p99, max and count of times; in microseconds, given nanoseconds."""
    if not values_ns:
        return {"count": 0}
    ordered = sorted(values_ns)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e3, 2)

    return {
        "count": len(ordered), "p50_us": at(0.5), "p99_us": at(0.99), "max_us": round(ordered[-1] / 1e3, 2),
    }  # fmt: skip
