# SPDX-License-Identifier: Apache-2.0
"""`valve demo` as a user runs it, short: what is promised and is no timing; the identity check has
power; an interrupted demo leaves nothing behind.

Each run of the demo takes minutes: two real engines start once or twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from valve_cli.demo.report import Report

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "valve_cli.main", "demo"]
MARK = "VALVE_TEST_MARK"


def run_demo(out: Path, *options: str) -> dict[str, Any]:
    """The report of a run on a quarter of the demo's memory, which a quarter of its requests fills; fails
    with the demo's own words if it does not exit 0."""
    text = (ROOT / "examples" / "demo.yaml").read_text()
    assert "memory: 1280Mi" in text
    policy = out / "policy.yaml"
    policy.write_text(text.replace("memory: 1280Mi", "memory: 384Mi"))
    done = subprocess.run(
        [*COMMAND, "--out", str(out), "--quick", "--policy", str(policy), "--sequences", "100", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    Report.model_validate_json((out / "report.json").read_text())
    document: dict[str, Any] = json.loads((out / "report.json").read_text())
    return document


def marked(mark: str) -> list[int]:
    """Processes that inherited this mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue  # not ours, or it has just ended
            if f"{MARK}={mark}".encode() in environ:
                found.append(int(entry.name))
    return found


@pytest.mark.timeout(1800)
def test_a_short_demo_keeps_every_promise_that_is_no_timing(tmp_path: Path) -> None:
    report = run_demo(tmp_path)
    assert report["device"] == "cpu"
    valve, phases = report["valve"], report["phases"]
    assert valve["max_preemptions_per_request"] <= 1
    assert valve["preemptions"] >= 1, "offline was never paused: the run shows nothing"
    assert valve["reclaims"] >= 1, "no memory in use was taken: the identity below shows nothing"
    assert valve["offline_requests_recomputed"] >= 1
    assert valve["offline_requests_compared"] >= 100
    assert valve["offline_outputs_identical"] is True, valve["offline_first_difference"]
    assert (valve["offline_requests_lost"], valve["offline_requests_duplicated"]) == (0, 0)
    for name in ("alone", "naive", "valve"):
        assert phases[name]["online_requests"] == report["load"]["online_requests"]
        assert phases[name]["online_errors"] == 0
        assert 0 < phases[name]["online_busy_share"] < 1
    for name in ("exclusive", "naive", "valve"):
        assert phases[name]["offline_tokens_per_s"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "both, Valve" in page
    assert "http" not in page


@pytest.mark.timeout(1800)
def test_an_engine_that_is_not_told_of_lost_blocks_is_found_out(tmp_path: Path) -> None:
    report = run_demo(tmp_path, "--fault", "drop-lost", "--phases", "exclusive,valve")
    valve = report["valve"]
    assert report["fault"] == "drop-lost"
    assert valve["reclaims"] >= 1
    assert valve["offline_requests_recomputed"] == 0
    assert valve["offline_outputs_identical"] is False
    assert valve["offline_first_difference"]
    assert {p["name"] for p in report["promises"] if not p["kept"]} >= {"offline outputs"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_demo_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    mark = uuid.uuid4().hex
    with (tmp_path / "said").open("wb") as said:
        demo = subprocess.Popen(
            [*COMMAND, "--out", str(tmp_path), "--phases", "valve", "--quick"],
            cwd=ROOT,
            stdout=said,
            stderr=said,
            env=os.environ | {MARK: mark},
        )
    try:
        deadline = time.monotonic() + 60
        while len(marked(mark)) < 6:  # the demo, the agent and its gate, two launchers, an engine
            assert demo.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline, "the engines never started"
            time.sleep(0.2)
        demo.send_signal(number)
        assert demo.wait(90) == 130
        assert marked(mark) == []
    finally:
        demo.kill()
        demo.wait()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--phases", "valve,vlave"], "choose from exclusive, alone, naive, valve"),
        (["--policy", "examples/none.yaml"], "there is no such file"),
        (["--policy", "examples/policy.yaml"], "has no spec.cpuDevice"),
        (["--model", "/nowhere"], "name a model folder"),
        (["--engine-python", "/nowhere/python"], "make build/engines"),
        (["--requests", "0"], "at least 1"),
        (["--requests", "5000"], "ask for fewer requests or start earlier"),
        (["--trace", "/nowhere.csv"], "cannot read the trace"),
    ],
    ids=["phase", "no policy", "a policy without the cpu device", "model", "engines", "requests",
         "more requests than the trace has", "trace"],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(tmp_path: Path, options: list[str], says: str) -> None:
    done = subprocess.run(
        [*COMMAND, "--out", str(tmp_path), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert says in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr
