# SPDX-License-Identifier: Apache-2.0
"""A real engine under `valve run`, told what to do by JSON lines; and an online tenant that takes its memory.

Threading model: one thread. Callers: the tests beside this file.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from valve_cli.bench.rig import JsonChild, LiveAgent, LiveTenant

START_S = 600.0
"""Loading vLLM takes 12 s on a quiet machine."""
EVERY_S = 0.5
"""Between two bursts of the online tenant: offline needs most of it to get anything done."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of every engine here: no network, both cores, warnings only."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
        **(extra or {}),
    }


class Engine(JsonChild):
    """A driver program (a file beside this one) in the engines' Python."""

    answer_s = START_S

    def end(self) -> None:
        """End of its input ends a driver; one that does not end is killed with its launcher."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(20)


def generate_disturbed(
    engine: Engine, thief: LiveTenant, agent: LiveAgent, slabs: int, *, times: int, **request: Any
) -> dict[str, Any]:
    """The engine's answer to `request`, while an online tenant takes `slabs` slabs again and again: each time
    it turns busy, wants them, holds them for a moment, gives them back and turns idle. It does so until
    `times` of them found memory in use (on a slow machine the first come before there is any), or until the
    engine has answered."""
    engine.tell("generate", **request)
    while reclaims_in_use(agent.events()) < times:
        early = engine.answered(EVERY_S)
        if early is not None:
            return early
        thief.ask("busy")
        taken = thief.ask("take", slabs=slabs)["held"]
        time.sleep(0.02)
        thief.ask("want", slabs=0)
        thief.ask("return", slabs=taken)
        thief.ask("idle")
    return engine.answer()


def reclaims_in_use(events: list[dict[str, Any]]) -> int:
    return sum(1 for event in events if event["event"] == "reclaim" and event["bytes_in_use"] > 0)
