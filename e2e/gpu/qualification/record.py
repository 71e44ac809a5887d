# SPDX-License-Identifier: Apache-2.0
"""What a part found, and the JSON document it becomes; the time it may spend; percentiles.

Threading model: values; a Clock belongs to the part's main thread. Callers: every part, qualify.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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


def _nowhere(figures: dict[str, Any]) -> None:
    """Drafts are not kept."""


class Clock:
    """What a part may still spend, and where its figures go while it runs: a part that is cut short says less
    and says so, and one that hangs leaves what it had."""

    def __init__(self, seconds: float, keep: Callable[[dict[str, Any]], None] = _nowhere) -> None:
        """`keep` stores figures as the draft of the result."""
        self._until = time.monotonic() + seconds
        self.keep = keep
        self.notes: list[str] = []
        """what was cut short"""

    @property
    def left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def cycles(self, count: int, steps_left: int, what: str, block: int = 1) -> Iterator[int]:
        """Sizes of blocks that make `count`, as long as this step's share of the time is not spent: there are
        `steps_left` of its kind, this one included. At least one block."""
        until, done = time.monotonic() + self.left_s / steps_left, 0
        while done < count:
            if done and time.monotonic() > until:
                self.notes.append(f"{what}: {done} of {count} cycles, for the part's time is limited")
                return
            size = min(block, count - done)
            yield size
            done += size


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
