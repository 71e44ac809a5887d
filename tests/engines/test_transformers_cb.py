# SPDX-License-Identifier: Apache-2.0
"""The light engine: transformers' continuous batching loses memory in use and ends with the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_process import Engine, environment, generate_disturbed, reclaims_in_use

from valve_cli.bench.rig import LiveAgent, LiveTenant, valve_run

DRIVER = Path(__file__).with_name("transformers_offline.py")
SUBJECTS = ("rivers", "iron", "bread", "the moon", "a dog", "winter", "trains", "glass")
PREAMBLE = "You are a careful assistant. You answer in complete sentences and explain every step. " * 6
TOKENS = 48


@pytest.mark.parametrize(
    ("options", "preamble", "fault", "same"),
    [
        pytest.param([], "", "", True, id="requests of their own"),
        pytest.param(["--prefix-caching"], PREAMBLE, "", True, id="a shared prefix in cached blocks"),
        pytest.param([], "", "drop-lost", False, id="not told that blocks are gone: the check has power"),
    ],
)
def test_outputs_survive_reclaims(
    agent: LiveAgent, thief: LiveTenant, runtime: Path, engine_python: Path, model: Path, tmp_path: Path,
    options: list[str], preamble: str, fault: str, same: bool,
) -> None:  # fmt: skip
    program = [str(engine_python), "-P", str(DRIVER), "--model", str(model), *options]
    command = valve_run(agent.socket, runtime, "offline", "batch", program)
    request = {"prompts": [f"{preamble}Tell me about {s}." for s in SUBJECTS], "tokens": TOKENS}
    with Engine("engine", command, environment({"VALVE_FAULT": fault}), tmp_path / "engine.log") as engine:
        assert engine.answer()["tenant"]
        calm = engine.ask("generate", **request)["tokens"]
        disturbed = generate_disturbed(engine, thief, agent, 92, times=4, **request)["tokens"]
    assert reclaims_in_use(agent.events()) >= 2, "the test did not take memory in use"
    assert (disturbed == calm) is same


def test_the_next_manager_begins_with_what_the_last_one_gave_back(
    agent: LiveAgent, thief: LiveTenant, runtime: Path, engine_python: Path, model: Path, tmp_path: Path
) -> None:
    """`generate_batch` makes a manager for every call."""
    program = [str(engine_python), "-P", str(DRIVER), "--model", str(model)]
    command = valve_run(agent.socket, runtime, "offline", "batch", program)
    request = {"prompts": [f"Tell me about {s}." for s in SUBJECTS], "tokens": TOKENS}
    with Engine("engine", command, environment({}), tmp_path / "engine.log") as engine:
        assert engine.answer()["tenant"]
        first = engine.ask("generate", **request)["tokens"]
        again = engine.ask("generate", new_manager=True, **request)["tokens"]
        disturbed = generate_disturbed(engine, thief, agent, 92, times=4, **request)["tokens"]
    assert again == first
    assert disturbed == first
    assert reclaims_in_use(agent.events()) >= 2, "the test did not take memory in use"
