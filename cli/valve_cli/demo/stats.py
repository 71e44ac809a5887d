# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of the report: percentiles, busy time, rates, preemptions per request, identity.

Pure: values in, values out; times are CLOCK_MONOTONIC nanoseconds.  Called by
`measure.py` and by the display.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Span = tuple[int, int]
"""[begin, end] in nanoseconds."""


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` (0..1) quantile by linear interpolation between order statistics.

    Hyndman and Fan's type 7, as numpy's default: position share × (n − 1).
    Raises ValueError for no values or a share outside 0..1."""
    if not values:
        raise ValueError("no values, no percentile")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be within 0..1, got {share}")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Summary:
    """Mean, p50, p99 and max of a sample, in the sample's unit."""

    mean: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """None for an empty sample: there is no figure to give."""
        if not values:
            return None
        return cls(
            sum(values) / len(values), percentile(values, 0.5), percentile(values, 0.99), float(max(values))
        )


def union(spans: Iterable[Span]) -> list[Span]:
    """Overlapping and touching spans merged, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def covered_share(spans: Iterable[Span], window: Span) -> float:
    """Share of the window covered by at least one span, 0..1."""
    begin, end = window
    if end <= begin:
        raise ValueError(f"the window [{begin}, {end}] is empty")
    covered = sum(max(0, min(b, end) - max(a, begin)) for a, b in union(spans))
    return covered / (end - begin)


def tokens_between(samples: Sequence[tuple[int, int]], window: Span) -> float:
    """Tokens generated within the window, from (time, cumulative tokens) samples in order.

    Between two samples the count is interpolated linearly, so that a step that spans the
    window's edge counts by the part inside."""

    def at(t_ns: int) -> float:
        index = bisect_right(samples, t_ns, key=lambda s: s[0])
        if index == 0:
            return float(samples[0][1])
        before = samples[index - 1]
        if index == len(samples):
            return float(before[1])
        after = samples[index]
        return before[1] + (after[1] - before[1]) * (t_ns - before[0]) / (after[0] - before[0])

    if not samples:
        return 0.0
    return at(window[1]) - at(window[0])


def pauses_within(pauses: Sequence[int], requests: Iterable[Span]) -> list[int]:
    """For each request the number of offline running→paused transitions in [arrival, end]."""
    ordered = sorted(pauses)
    return [bisect_right(ordered, end) - bisect_left(ordered, begin) for begin, end in requests]


@dataclass(frozen=True)
class Comparison:
    """Outputs of a phase against their references, request by request."""

    compared: int
    identical: int
    without_reference: int
    first_difference: str
    """Which request differs first and where; empty if none does."""

    @property
    def all_identical(self) -> bool:
        return self.compared > 0 and self.compared == self.identical and not self.without_reference


def compare_outputs(
    references: Mapping[int, Sequence[int]], outputs: Iterable[tuple[str, int, Sequence[int]]]
) -> Comparison:
    """Compare (request id, prompt number, token ids) with the reference of the same prompt."""
    compared = identical = without = 0
    first = ""
    for rid, prompt, tokens in outputs:
        reference = references.get(prompt)
        if reference is None:
            without += 1
            continue
        compared += 1
        if list(tokens) == list(reference):
            identical += 1
        elif not first:
            place = next(
                (i for i, (a, b) in enumerate(zip(tokens, reference, strict=False)) if a != b),
                min(len(tokens), len(reference)),
            )
            first = (
                f"request {rid} (prompt {prompt}): token {place} of {len(reference)} differs,"
                f" {len(tokens)} tokens came"
            )
    return Comparison(compared, identical, without, first)


@dataclass(frozen=True)
class Bookkeeping:
    """Requests issued against requests that came back."""

    issued: int
    finished: int
    lost: int
    duplicated: int


def account(issued: Sequence[str], finished: Sequence[str], aborted: Iterable[str] = ()) -> Bookkeeping:
    """Lost: issued, not finished, not aborted by us.  Duplicated: finished more than once."""
    done = set(finished)
    lost = set(issued) - done - set(aborted)
    return Bookkeeping(len(issued), len(done), len(lost), len(finished) - len(done))
