# SPDX-License-Identifier: Apache-2.0
"""Trace loading and scaling: three formats, refusals with the line, the shipped slice."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_cli.demo.errors import TraceError
from valve_cli.demo.settings import Settings
from valve_cli.demo.trace import Arrival, Scaling, load, stretch

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51,879,55
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3052, "input_length": 7319, "output_length": 490, "hash_ids": [0]}
"""

FORMATS = {
    "Azure 2023: seven digits of a second, and none": (
        AZURE,
        [(0.0, 374, 44), (4.314579, 396, 109), (4.31941, 879, 55)],
    ),
    "BurstGPT: failed requests (no response tokens) are left out": (
        BURSTGPT,
        [(0.0, 472, 18), (113.0, 417, 276)],
    ),
    "Mooncake: milliseconds": (MOONCAKE, [(0.0, 6755, 500), (3.052, 7319, 490)]),
}


@pytest.mark.parametrize(("text", "expected"), FORMATS.values(), ids=FORMATS)
def test_formats(tmp_path: Path, text: str, expected: list[tuple[float, int, int]]) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    found = load(file)
    assert [(a.context_tokens, a.output_tokens) for a in found] == [e[1:] for e in expected]
    assert [a.at_s for a in found] == pytest.approx([e[0] for e in expected], abs=1e-6)


REFUSALS = {
    "no known header": ("a,b,c\n1,2,3\n", "no trace format known here"),
    "a number that is none": (AZURE.replace("396", "many"), "line 3: ValueError"),
    "a line of jsonl without a field": (MOONCAKE.replace("output_length", "o"), "line 1: KeyError"),
    "a row cut short": (AZURE + "2023-11-16 18:15:52.0,1\n", "line 5"),
    "out of order": (AZURE + "2023-11-16 18:15:40.0,1,1\n", "request 4 arrives before request 3"),
    "no request at all": ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
}


@pytest.mark.parametrize(("text", "says"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_name_the_place(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(TraceError, match=says):
        load(file)


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the trace"):
        load(tmp_path / "none.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not a text file"):
        load(tmp_path / "binary")


def test_scaling_scales_then_bounds() -> None:
    scaling = Scaling(
        time=4.0, context=0.5, output=0.1, context_min=64, context_max=512, output_min=2, output_max=32
    )
    made = scaling.apply([Arrival(0.0, 10, 10), Arrival(1.5, 400, 100), Arrival(2.0, 9000, 9000)])
    assert made == [Arrival(0.0, 64, 2), Arrival(6.0, 200, 10), Arrival(8.0, 512, 32)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"time": 0.0}, "time scale"), ({"output_min": 9, "output_max": 8}, "output bounds")],
    ids=["a scale of 0", "bounds the wrong way round"],
)
def test_scaling_refuses_nonsense(fields: dict[str, float], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        Scaling(**fields)  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50), st.floats(0, 9e3), st.integers(1, 60))
def test_a_stretch_begins_at_zero_and_keeps_gaps(times: list[float], start: float, count: int) -> None:
    arrivals = [Arrival(t, 1, 1) for t in sorted(times)]
    after = [a.at_s for a in arrivals if a.at_s >= start]
    if len(after) < count:
        with pytest.raises(TraceError, match="ask for fewer requests"):
            stretch(arrivals, start, count)
        return
    made = stretch(arrivals, start, count)
    assert len(made) == count
    assert made[0].at_s == 0
    assert [m.at_s for m in made] == [t - after[0] for t in after[:count]]


def test_the_shipped_slice_holds_what_the_demo_and_its_longer_run_need() -> None:
    from valve_cli.demo.main import SHIPPED_TRACE

    arrivals = load(SHIPPED_TRACE)
    defaults = Settings.__dataclass_fields__
    assert len(arrivals) == 1500
    assert len(stretch(arrivals, defaults["trace_start_s"].default, 1000)) == 1000
    assert defaults["requests"].default >= 120
    assert (SHIPPED_TRACE.parent / "README.md").read_text().count("CC-BY-4.0") == 1
