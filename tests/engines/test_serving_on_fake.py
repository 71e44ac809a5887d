# SPDX-License-Identifier: Apache-2.0
"""The qualification's part `serving` to its end: two transformers engines, every arrangement that can be had
without a GPU, every route of Valve. The driver is fake and the engines compute on the CPU, so figures mean
nothing; what counts is that requests are served, busy and idle arrive, and the document is whole."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fakenv

PROGRAM = Path(__file__).resolve().parents[2] / "e2e" / "gpu" / "qualify.py"


@pytest.fixture
def machine() -> Iterator[fakenv.Machine]:
    folder = fakenv.build()
    reason = fakenv.unavailable(folder)
    if reason:
        pytest.skip(f"the fake NVIDIA driver cannot run here: {reason}")
    with fakenv.Machine(folder) as made:
        yield made


@pytest.mark.timeout(600)
def test_serving_runs_in_every_arrangement(
    machine: fakenv.Machine, engine_python: Path, tmp_path: Path
) -> None:
    options = ["--parts", "serving", "--out", tmp_path, "--build", tmp_path / "build"]
    done = subprocess.run(
        [*machine.prefix(), engine_python, PROGRAM, *options],
        env=machine.environment(), capture_output=True, text=True, timeout=570, check=False,
    )  # fmt: skip
    document: dict[str, Any] = json.loads((tmp_path / "gpu-fake-serving.json").read_text())
    said = f"{document['answer']}\n{document['notes']}\n{done.stderr[-4000:]}"
    assert document["verdict"] == "finding", said
    assert done.returncode == 0, said
    figures = document["figures"]
    assert set(figures) == {"model", "alone", "naive", "launch-gate", "in-process", "agent", "xids"}, said
    for name in ("alone", "naive", "launch-gate", "in-process", "agent"):
        online, offline = figures[name]["online"], figures[name]["offline"]
        assert (online["unfinished"], online["errors"], offline["errors"]) == (0, [], []), name
        assert online["ttft_ms"]["count"] == online["requests"] > 0, name
        assert set(figures[name]["ratios to alone"]) == {
            "ttft p50", "ttft p99", "tpot p50", "offline tokens"
        }, name  # fmt: skip
    for route in ("launch-gate", "in-process", "agent"):
        assert figures[route]["pauses"] > 0, f"{route}: online turned busy"
        assert figures[route]["signal to evicted"]["count"] == figures[route]["pauses"]
        assert figures[route]["problems"] == []
    assert figures["alone"]["offline"]["tokens"] > 0
