# SPDX-License-Identifier: Apache-2.0
"""The qualification's pieces that need no driver: the list of parts and its table in the docs, percentiles,
the judgement of the serving part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from qualification import machine, nvrtc, serving
from qualification.parts import PARTS
from qualification.record import Clock, spread

from valve_agent.devices.nvidia import rm

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "gpu.md").read_text()


def test_every_question_has_a_part() -> None:
    assert [f"e{n}" for n in range(1, 17)] == [name for name in PARTS if name.startswith("e")]
    assert [name for name in PARTS if not name.startswith("e")] == ["preempt", "reclaim", "serving"]
    assert all(part.limit_s < 600 for part in PARTS.values())


def test_the_docs_list_every_part_and_link_every_result() -> None:
    rows = [line.split("|")[1].strip() for line in DOCS.splitlines() if line.startswith("| e")]
    assert rows == [name for name in PARTS if name.startswith("e")]
    for name in PARTS:
        (row,) = [line for line in DOCS.splitlines() if line.startswith(f"| {name} |")]
        results = [
            path.name
            for path in (ROOT / "docs" / "results").glob(f"gpu-*-{name}.json")
            if not path.name.startswith("gpu-fake-")
        ]
        assert all(result in row for result in results), f"{results} is not linked in: {row}"
        assert bool(results) != ("not yet measured" in row), row


def test_the_list_of_parts_can_be_had_without_a_gpu() -> None:
    command = [sys.executable, "-S", ROOT / "e2e" / "gpu" / "qualify.py", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(PARTS)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], {"count": 0}),
        ([5_000], {"count": 1, "p50_us": 5.0, "p99_us": 5.0, "max_us": 5.0}),
        (range(1000, 101_000, 1000), {"count": 100, "p50_us": 51.0, "p99_us": 100.0, "max_us": 100.0}),
    ],
)
def test_spread(values: Any, expected: dict[str, float]) -> None:
    assert spread(list(values)) == expected


def test_cycles_end_with_their_share_of_the_time() -> None:
    whole = Clock(1e6)
    assert list(whole.cycles(250, 2, "all of them", block=100)) == [100, 100, 50]
    assert whole.notes == []
    spent = Clock(0)
    assert list(spent.cycles(250, 1, "pauses", block=100)) == [100], "one block in any case"
    assert spent.notes == ["pauses: 100 of 250 cycles, for the part's time is limited"]
    assert list(spent.cycles(1, 1, "one")) == [1]
    assert len(spent.notes) == 1, "what is whole has no note"


@pytest.mark.parametrize(
    ("version", "branch"),
    [("525.60.13", "535"), ("555.42.06", "550"), ("585.10.01", "580"), ("610.43.02", "595")],
)
def test_the_layouts_of_an_unknown_driver(version: str, branch: str) -> None:
    assert rm.branch_of(version) is None
    assert machine._nearest(version).name == branch


def test_compilers_are_found_in_packages_the_newest_first(tmp_path: Path) -> None:
    places = ("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cu13/lib/libnvrtc.so.13")
    for place in (*places, "nvidia/cu13/lib/libnvrtc-builtins.so.13.0"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    found = [library for library in nvrtc.find([str(tmp_path)]) if tmp_path in library.parents]
    assert found == [tmp_path / places[1], tmp_path / places[0]]
    assert [nvrtc.major(library) for library in found] == [13, 12]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("fake", "fake"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
    ],
)
def test_the_device_in_a_file_name(name: str, slug: str) -> None:
    assert machine.slug(name) == slug
    assert machine.Machine(name, "580.142", rm.BRANCHES["580"], "6.1").is_fake == (name == "fake")


def phase(ttft: float, tpot: float, tokens: float, errors: tuple[str, ...] = ()) -> dict[str, Any]:
    def spread_of(value: float) -> dict[str, float]:
        return {"p50": value, "p99": 2 * value}

    return {
        "online": {"ttft_ms": spread_of(ttft), "tpot_ms": spread_of(tpot), "errors": list(errors)},
        "offline": {"tokens_per_s": tokens, "errors": []},
        "pauses": 3,
    }


def test_serving_reports_ratios_to_alone() -> None:
    figures = {
        "model": {},
        "alone": phase(10, 2, 1000),
        "naive": phase(40, 6, 500),
        "agent": phase(10.5, 2, 400),
    }
    found = serving._judge(figures, ["mps: not here"])
    assert (found.verdict, found.notes) == ("finding", ["mps: not here"])
    assert found.answer.startswith("route agent: TTFT p99 1.05 x, TPOT 1.0 x of alone; offline 0.4 x")
    assert found.figures["naive"]["ratios to alone"]["ttft p50"] == 4.0


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"alone": phase(10, 2, 1000)}, "every route of Valve"),
        ({"alone": phase(10, 2, 1000), "agent": phase(10, 2, 1, ("out of memory",))}, "agent: online"),
        ({"alone": phase(10, 2, 1000), "agent": phase(10, 2, 1) | {"pauses": 0}}, "no pause came by agent"),
    ],
    ids=["no route ran", "an engine had errors", "online was never seen busy"],
)
def test_serving_fails(figures: dict[str, Any], says: str) -> None:
    found = serving._judge({"model": {}, **figures}, [])
    assert found.verdict == "fail"
    assert says in found.answer
