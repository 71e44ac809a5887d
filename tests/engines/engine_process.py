# SPDX-License-Identifier: Apache-2.0
"""A real engine under `valve run`, told what to do by JSON lines; and an online tenant that takes its memory.

Threading model: one thread. Callers: the tests beside this file.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from valve_cli.bench.rig import LiveTenant, RigError, wait_for

START_S = 150.0
"""Loading vLLM takes 12 s on a quiet machine."""


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


def valve_run(socket: Path, runtime: Path, workload: str, name: str, command: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "valve_cli.main", "run", "--workload", workload, "--name", name, "--socket",
        str(socket), "--runtime", str(runtime), "--", *command,
    ]  # fmt: skip


class Engine:
    """A driver program (a file beside this one) in the engines' Python, as an offline tenant."""

    def __init__(self, command: list[str], log: Path, env: Mapping[str, str]) -> None:
        self._log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, env=dict(env)
            )
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tell(self, do: str, **fields: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self._process.stdin.flush()

    def answered(self, timeout_s: float) -> dict[str, Any] | None:
        """The next answer, or None if there is none within the time. Raises RigError if the engine ended."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(fd, 1 << 20)
            if not data:
                raise RigError(f"the engine ended:\n{self._log.read_text()[-4000:]}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def answer(self, timeout_s: float = START_S) -> dict[str, Any]:
        found = self.answered(timeout_s)
        if found is None:
            raise RigError(f"no answer within {timeout_s} s:\n{self._log.read_text()[-4000:]}")
        return found

    def ask(self, do: str, timeout_s: float = START_S, **fields: Any) -> dict[str, Any]:
        self.tell(do, **fields)
        return self.answer(timeout_s)

    def close(self) -> None:
        """End of its input ends a driver; one that does not end is killed with its launcher."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(20)


def generate_disturbed(
    engine: Engine, thief: LiveTenant, slabs: int, *, times: int, every_s: float = 0.6, **request: Any
) -> dict[str, Any]:
    """The engine's answer to `request`, while an online tenant takes `slabs` slabs over and over: each time
    it turns busy, wants them, holds them for a moment, gives them back and turns idle."""
    engine.tell("generate", **request)
    for _ in range(times):
        early = engine.answered(every_s)
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


__all__ = [
    "Engine", "RigError", "environment", "generate_disturbed", "reclaims_in_use", "valve_run", "wait_for",
]  # fmt: skip
