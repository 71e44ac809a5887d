# SPDX-License-Identifier: Apache-2.0
"""No output of a step that met a lost block is believed, with one step in flight and with two: vLLM's real
schedulers on a pretended GPU (scheduler_simulation.py). Two in flight is what vLLM does on a GPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engine_process import environment

PROGRAM = Path(__file__).with_name("scheduler_simulation.py")
SOUND = {
    "seeds": 60, "asynchronous": False, "prefix": False, "tell": True, "departed": True, "sessions": False,
    "frontier": True, "runner": 1,
}  # fmt: skip
SESSIONS = {**SOUND, "seeds": 30, "prefix": True, "sessions": True}
CASES: dict[str, dict[str, Any]] = {
    "one step in flight": SOUND,
    "one step in flight, shared prefixes": {**SOUND, "prefix": True},
    "two steps in flight": {**SOUND, "asynchronous": True},
    "two steps in flight, shared prefixes": {**SOUND, "asynchronous": True, "prefix": True},
    "runner V2, one step": {**SOUND, "prefix": True, "runner": 2},
    "runner V2, two steps": {**SOUND, "asynchronous": True, "prefix": True, "runner": 2},
    "streaming sessions, one step": SESSIONS,
    "streaming sessions, two steps": {**SESSIONS, "asynchronous": True},
    "streaming sessions, runner V2": {**SESSIONS, "asynchronous": True, "runner": 2},
}
TWO_SHARED = CASES["two steps in flight, shared prefixes"]
POWER: dict[str, dict[str, Any]] = {
    "the engine hears of no loss": {**SOUND, "seeds": 5, "tell": False},
    "requests that left in flight are believed": {
        **SOUND,
        "asynchronous": True,
        "prefix": True,
        "departed": False,
    },
    "a session forgets how far it was": {**SESSIONS, "frontier": False},
}


@pytest.fixture(scope="module")
def answers(engine_python: Path, model: Path) -> dict[str, dict[str, int]]:
    asked = {"model": str(model), "cases": CASES | POWER}
    done = subprocess.run(
        [str(engine_python), "-P", str(PROGRAM), json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_token_is_as_it_would_be(answers: dict[str, dict[str, int]], name: str) -> None:
    answer = answers[name]
    assert answer["reclaims_in_use"] > answer["requests"] / 2, "too little was taken to prove anything"
    assert answer["recomputed"] > answer["requests"] / 4
    assert answer["wrong"] == 0


@pytest.mark.parametrize("name", POWER)
def test_the_check_has_power(answers: dict[str, dict[str, int]], name: str) -> None:
    assert answers[name]["wrong"] > 0
