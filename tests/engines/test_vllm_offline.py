# SPDX-License-Identifier: Apache-2.0
"""P3 with a real engine: memory in use is taken from a vLLM batch in the middle of its layers, over and over,
and every request still ends with the tokens it would have had. float32, because only there do the kernels
give the same result whatever the batch looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_process import Engine, environment, generate_disturbed, reclaims_in_use

from valve_cli.bench.rig import LiveAgent, LiveTenant, valve_run

DRIVER = Path(__file__).with_name("vllm_offline.py")
TOPICS = (
    "The capital of France is", "Once upon a time", "List three colours:", "In the year 1969",
    "My favourite food is", "How do computers work?", "Write a poem about rain.", "The sea at night",
)  # fmt: skip
PREAMBLE = "You are a careful assistant. You answer in complete sentences and explain every step. " * 6
TOKENS = 64


def prompts(count: int, preamble: str = "") -> list[str]:
    return [f"{preamble}{TOPICS[n % len(TOPICS)]} ({n})" for n in range(count)]


def run_twice(
    agent: LiveAgent, thief: LiveTenant, command: list[str], log: Path, preamble: str = "", **extra: str
) -> tuple[list[Any], list[Any]]:
    """Tokens of an undisturbed run and of one that lost memory in use again and again."""
    with Engine("engine", command, environment(extra), log) as engine:
        engine.answer()  # ready
        request = {"prompts": prompts(24, preamble), "tokens": TOKENS}
        calm = engine.ask("generate", **request)["tokens"]
        assert reclaims_in_use(agent.events()) == 0
        if preamble:  # or the second run would find every prompt in the prefix cache
            assert engine.ask("reset")["reset"], "the prefix cache cannot be reset while blocks are withdrawn"
        disturbed = generate_disturbed(engine, thief, agent, 80, times=6, **request)["tokens"]
    return calm, disturbed


@pytest.mark.parametrize(
    ("options", "preamble"),
    [
        pytest.param([], "", id="requests of their own"),
        pytest.param(["--prefix-caching"], PREAMBLE, id="a shared prefix in cached blocks"),
    ],
)
def test_outputs_survive_reclaims(
    agent: LiveAgent, thief: LiveTenant, runtime: Path, engine_python: Path, model: Path, tmp_path: Path,
    options: list[str], preamble: str,
) -> None:  # fmt: skip
    program = [str(engine_python), "-P", str(DRIVER), "--model", str(model), *options]
    command = valve_run(agent.socket, runtime, "offline", "batch", program)
    calm, disturbed = run_twice(agent, thief, command, tmp_path / "engine.log", preamble)
    assert reclaims_in_use(agent.events()) >= 3, "the test did not take memory in use"
    assert disturbed == calm


def test_the_check_has_power(
    agent: LiveAgent, thief: LiveTenant, runtime: Path, engine_python: Path, model: Path, tmp_path: Path
) -> None:
    """The same, but the engine is not told that its blocks are gone."""
    program = [str(engine_python), "-P", str(DRIVER), "--model", str(model)]
    command = valve_run(agent.socket, runtime, "offline", "batch", program)
    calm, disturbed = run_twice(agent, thief, command, tmp_path / "engine.log", VALVE_FAULT="drop-lost")
    assert reclaims_in_use(agent.events()) >= 3, "the test did not take memory in use"
    assert disturbed != calm
