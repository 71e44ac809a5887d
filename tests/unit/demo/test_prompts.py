# SPDX-License-Identifier: Apache-2.0
"""Prompts: exact lengths, the same every time, different from each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_cli.demo.errors import MeasurementError
from valve_cli.demo.prompts import Prompts
from valve_cli.demo.settings import OfflineLoad

PROMPTS = Prompts.of([1, 2, 3], [8, 9], [[10 * n + k for k in range(n % 5 + 3)] for n in range(1, 20)])


@given(st.integers(0, 20_000), st.integers(6, 2000))
def test_a_prompt_has_the_asked_length_inside_the_chat_format(number: int, tokens: int) -> None:
    made = PROMPTS.make(number, tokens)
    assert len(made) == tokens
    assert made[:3] == [1, 2, 3]
    assert made[-2:] == [8, 9]
    assert made == PROMPTS.make(number, tokens)


def test_neighbouring_prompts_differ_from_their_first_word_on() -> None:
    firsts = {PROMPTS.make(n, 40)[3] for n in range(len(PROMPTS.passages))}
    assert len(firsts) == len(PROMPTS.passages)


def test_too_short_a_prompt_and_an_empty_text_are_refused() -> None:
    with pytest.raises(MeasurementError, match="raise the lower bound"):
        PROMPTS.make(0, 5)
    with pytest.raises(MeasurementError, match="no tokens"):
        Prompts.of([1], [2], [[], []])


def test_offline_lengths_vary_within_their_bounds() -> None:
    load = OfflineLoad()
    lengths = load.lengths()
    assert len(lengths) == load.prompts
    for column, (low, high) in enumerate((load.prompt_tokens, load.output_tokens)):
        values = [pair[column] for pair in lengths]
        assert low <= min(values) <= max(values) <= high
        assert len(set(values)) > (high - low) / 2
