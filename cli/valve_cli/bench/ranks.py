# SPDX-License-Identifier: Apache-2.0
"""p50, p99 and max of what a bench measured, the same way in each. Pure. Callers: preempt.py, reclaim.py."""

from __future__ import annotations

from collections.abc import Sequence


def ranks(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and max by nearest rank, in the unit of the values, of which there is at least one."""
    ordered = sorted(values)
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "max": ordered[-1],
    }
