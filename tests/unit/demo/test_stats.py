# SPDX-License-Identifier: Apache-2.0
"""The report's arithmetic against known values and plain recounts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_cli.demo.stats import (
    Summary,
    account,
    compare_outputs,
    covered_share,
    pauses_within,
    percentile,
    tokens_between,
    union,
)

SPANS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=12).map(
    lambda pairs: [(a, a + width) for a, width in pairs]
)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5.0], 0.99, 5.0),
        ([1, 2, 3, 4], 0.5, 2.5),
        ([4, 1, 3, 2], 0.25, 1.75),
        (list(range(101)), 0.99, 99.0),
        ([0, 10], 0.99, 9.9),
    ],
    ids=["one value", "between the middle two", "order does not matter", "p99 of 0..100", "interpolated"],
)
def test_percentile(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)


def test_percentile_of_nothing_is_an_error_and_a_summary_of_nothing_is_none() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        percentile([1.0], 99)
    assert Summary.of([]) is None
    assert Summary.of([1.0, 3.0]) == Summary(2.0, 2.0, 2.98, 3.0)


@given(SPANS)
def test_union_and_covered_share_agree_with_a_recount(spans: list[tuple[int, int]]) -> None:
    merged = union(spans)
    assert all(a[1] < b[0] for a, b in pairwise(merged))
    inside = sum(1 for t in range(300) if any(a <= t < b for a, b in spans))
    assert covered_share(spans, (0, 300)) == pytest.approx(inside / 300)


@pytest.mark.parametrize(
    ("window", "expected"),
    [((0, 100), 50.0), ((10, 20), 10.0), ((15, 30), 10.0), ((-50, 5), 0.0), ((100, 900), 0.0)],
    ids=["all of it", "one step", "half a step and a pause", "before the first", "after the last"],
)
def test_tokens_between_interpolates_within_a_step(window: tuple[int, int], expected: float) -> None:
    samples = [(10, 0), (20, 10), (30, 15), (90, 45), (100, 50)]
    assert tokens_between(samples, window) == pytest.approx(expected)
    assert tokens_between([], window) == 0


@pytest.mark.parametrize(
    ("pauses", "request_span", "expected"),
    [
        ([], (10, 20), 0),
        ([10], (10, 20), 1),
        ([20], (10, 20), 1),
        ([9, 21], (10, 20), 0),
        ([9, 11, 15, 30], (10, 20), 2),
    ],
    ids=["none", "at arrival", "at the end", "just outside", "two: a broken promise is seen"],
)
def test_preemptions_are_counted_within_a_request(
    pauses: list[int], request_span: tuple[int, int], expected: int
) -> None:
    assert pauses_within(pauses, [request_span]) == [expected]


@given(st.lists(st.integers(0, 100), max_size=20), SPANS)
def test_preemption_counts_agree_with_a_recount(pauses: list[int], spans: list[tuple[int, int]]) -> None:
    expected = [sum(1 for p in pauses if a <= p <= b) for a, b in spans]
    assert pauses_within(pauses, spans) == expected


REFERENCE = {0: [1, 2, 3], 1: [4, 5]}
COMPARISONS = {
    "all the same": ([("a", 0, [1, 2, 3]), ("b", 1, [4, 5])], True, ""),
    "one token differs": ([("a", 0, [1, 9, 3])], False, "request a (prompt 0): token 1 of 3"),
    "one token is missing": ([("a", 0, [1, 2])], False, "token 2 of 3 differs, 2 tokens came"),
    "one token too many": ([("b", 1, [4, 5, 6])], False, "token 2 of 2 differs, 3 tokens came"),
    "a prompt without a reference": ([("a", 0, [1, 2, 3]), ("c", 7, [1])], False, ""),
    "nothing to compare proves nothing": ([], False, ""),
}


@pytest.mark.parametrize(("outputs", "identical", "says"), COMPARISONS.values(), ids=COMPARISONS)
def test_comparison(outputs: list[tuple[str, int, list[int]]], identical: bool, says: str) -> None:
    found = compare_outputs(REFERENCE, outputs)
    assert found.all_identical is identical
    assert says in found.first_difference


@pytest.mark.parametrize(
    ("issued", "finished", "aborted", "lost", "doubled"),
    [
        (["a", "b"], ["a", "b"], [], 0, 0),
        (["a", "b"], ["a"], [], 1, 0),
        (["a", "b"], ["a"], ["b"], 0, 0),
        (["a", "b"], ["a", "b", "a"], [], 0, 1),
    ],
    ids=["all came back", "one lost", "one dropped by us", "one came twice"],
)
def test_bookkeeping(
    issued: list[str], finished: list[str], aborted: list[str], lost: int, doubled: int
) -> None:
    books = account(issued, finished, aborted)
    assert (books.lost, books.duplicated) == (lost, doubled)
