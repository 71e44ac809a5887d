# SPDX-License-Identifier: Apache-2.0
"""`valve bench preempt` measures what it says, and refuses to invent figures. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from valve_cli.bench import preempt, preempt_rig
from valve_cli.bench.rig import RigError


def test_json_report(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--cycles", "30", "--block", "10", "--runtime", str(runtime)]
    assert preempt.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cycles"] == 30
    for side in ("ours_us", "floor_us"):
        assert 0 < report[side]["p50"] <= report[side]["p99"] <= report[side]["max"]
    assert report["ratio_p50"] == report["ours_us"]["p50"] / report["floor_us"]["p50"]
    assert report["moved"] == {"ours": 0, "floor": 0}
    assert report["gate_us"]["p50"] <= report["ours_us"]["p50"]


def test_table(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preempt.main(["--cycles", "10", "--runtime", str(runtime)]) == 0
    assert "ratio" in capsys.readouterr().out


def test_without_a_runtime_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lib").mkdir()
    assert preempt.main(["--runtime", str(tmp_path)]) == 1
    assert "make runtime" in capsys.readouterr().err


def test_without_a_compiler_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RigError, match="no C compiler: install one"):
        preempt_rig.compile_c("victim", tmp_path)
