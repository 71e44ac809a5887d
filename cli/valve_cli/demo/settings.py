# SPDX-License-Identifier: Apache-2.0
"""What the demo runs: the load, the offline batch, the engines' flags.

Values only, the same for every phase (the phases differ in who runs, nothing else).  The
figures are chosen for a 135M-parameter model on 2 CPU cores: online is busy about 60 % of
the time, offline fills the device's memory.  `main.py` makes a Settings from the command
line and the policy; the report carries it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from valve_cli.demo.trace import Scaling

MIB = 1 << 20
PHASES = ("exclusive", "alone", "naive", "valve")


@dataclass(frozen=True)
class OfflineLoad:
    """The offline batch: `prompts` distinct prompts, fed over and over in the same order.

    sequences: requests kept in the engine; more than its memory holds, so that memory is
    always in use.  Prompt and output lengths (tokens) vary evenly between their bounds.
    """

    prompts: int = 256
    sequences: int = 340
    prompt_tokens: tuple[int, int] = (48, 112)
    output_tokens: tuple[int, int] = (32, 96)
    exclusive_s: float = 40.0
    """Shortest measured time of the exclusive phase; it lasts until every prompt has its reference."""

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of each distinct prompt.

        A golden-ratio and a √2 sequence: evenly spread, without a random generator."""

        def spread(number: int, step: float, bounds: tuple[int, int]) -> int:
            low, high = bounds
            return low + int((number * step) % 1.0 * (high - low + 1))

        return [
            (
                spread(n, 0.6180339887, self.prompt_tokens),
                spread(n, 0.4142135624, self.output_tokens),
            )
            for n in range(self.prompts)
        ]


@dataclass(frozen=True)
class EngineFlags:
    """vLLM flags, the same in every phase.  Prefix caching: off online, where hits on the demo's
    text would not be what the trace's users had; on offline, so that a request that was preempted
    finds the blocks it has not lost."""

    online_dtype: str = "bfloat16"
    offline_dtype: str = "float32"
    max_model_len: int = 2048
    online_max_seqs: int = 32
    batched_tokens: int = 512
    offline_batched_tokens: int = 1024
    block_size: int = 32
    online_floor_blocks: int = 1
    """KV blocks the online engine keeps when it is idle (Valve phase; 0.7 MiB in bfloat16)."""
    online_idle_return_s: float = 0.2
    """How long it keeps what it no longer needs (Valve phase)."""


@dataclass(frozen=True)
class Settings:
    """Everything a run of the demo is made of."""

    model: Path
    engine_python: Path
    runtime: Path
    policy: Path
    out: Path
    device_bytes: int
    slab_bytes: int
    trace: Path
    trace_start_s: float = 40.0
    requests: int = 124
    phases: tuple[str, ...] = PHASES
    scaling: Scaling = field(
        default_factory=lambda: Scaling(
            time=6.0, context=0.11, output=0.1, context_min=32, context_max=384, output_min=8, output_max=80
        )
    )
    offline: OfflineLoad = field(default_factory=OfflineLoad)
    flags: EngineFlags = field(default_factory=EngineFlags)
    core: int = field(default_factory=lambda: max(os.sched_getaffinity(0)))
    """The CPU that stands for the device: the compute threads of both engines are bound to it, in every
    phase.  The other CPUs are the host's: HTTP servers, the agent, the load."""
    naive_online_share: float = 0.25
    """Static split of the device's memory in the naive phase: online's part."""
    fault: str = ""

    @property
    def online_static_bytes(self) -> int:
        return int(self.device_bytes * self.naive_online_share) // (2 * MIB) * (2 * MIB)

    @property
    def naive_sequences(self) -> int:
        """The offline batch's share of sequences under the static split."""
        return max(1, int(self.offline.sequences * (1 - self.naive_online_share)))

    @property
    def logs(self) -> Path:
        return self.out / "logs"
