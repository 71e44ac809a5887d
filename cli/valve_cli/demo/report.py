# SPDX-License-Identifier: Apache-2.0
"""The shape of out/demo/report.json, schema `valve.io/demo-report/v1`.

Every figure's unit is in its name; None means "not measured in this phase".  Models only:
`measure.py` fills them, `page.py` and `summary.py` show them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(Model):
    """Mean, median, 99th percentile and maximum of a sample."""

    mean: float
    p50: float
    p99: float
    max: float


class PreemptFigures(Model):
    """Microseconds from the online engine's busy signal to "no offline thread runs"."""

    p50: float
    p99: float
    max: float


class Phase(Model):
    """One phase.  Online figures are None where no online engine was used, offline ones likewise."""

    ttft_ms: Figures | None
    tpot_ms: Figures | None
    online_requests: int = Field(ge=0)
    online_errors: int = Field(ge=0)
    online_busy_share: float = Field(ge=0, le=1)
    offline_tokens_per_s: float = Field(ge=0)
    duration_s: float = Field(gt=0)
    online_output_tokens: int = Field(ge=0)
    online_output_tokens_per_s: float = Field(ge=0)
    offline_requests_finished: int = Field(ge=0)
    offline_sequences: int = Field(ge=0, description="requests kept in the offline engine")


class ValvePhase(Phase):
    """The Valve phase: what the others have, and what Valve did."""

    max_preemptions_per_request: int = Field(ge=0)
    preemptions: int = Field(ge=0)
    preempt_us: PreemptFigures | None
    reclaims: int = Field(ge=0, description="reclaim operations that took offline memory in use")
    reclaims_all: int = Field(ge=0, description="reclaim operations, those of idle memory included")
    reclaimed_bytes_in_use: int = Field(ge=0)
    reclaimed_bytes: int = Field(ge=0)
    reclaim_us: Figures | None
    offline_requests_recomputed: int = Field(ge=0)
    offline_tokens_recomputed: int = Field(ge=0)
    offline_requests_compared: int = Field(ge=0)
    offline_outputs_identical: bool
    offline_first_difference: str
    offline_requests_lost: int = Field(ge=0)
    offline_requests_duplicated: int = Field(ge=0)
    offline_paused_share: float = Field(ge=0, le=1)


class Phases(Model):
    exclusive: Phase | None = None
    alone: Phase | None = None
    naive: Phase | None = None
    valve: ValvePhase | None = None


class Ratios(Model):
    """Figures of one phase over those of another, in this run.  None: a phase was left out."""

    ttft_mean_valve_over_alone: float | None = None
    ttft_p99_valve_over_alone: float | None = None
    tpot_mean_valve_over_alone: float | None = None
    tpot_p99_valve_over_alone: float | None = None
    ttft_mean_naive_over_alone: float | None = None
    ttft_p99_naive_over_alone: float | None = None
    tpot_mean_naive_over_alone: float | None = None
    tpot_p99_naive_over_alone: float | None = None
    offline_share_valve: float | None = Field(
        default=None, description="offline tokens/s over (exclusive rate × share of time online was idle)"
    )
    offline_over_exclusive_valve: float | None = None
    offline_over_exclusive_naive: float | None = None


class Promise(Model):
    """One promise of the design, what was measured, and whether it was kept."""

    name: str
    promise: str
    measured: str
    kept: bool


class Versions(Model):
    valve: str
    commit: str
    python: str
    vllm: str
    torch: str
    kernel: str


class Machine(Model):
    cpu: str
    cores: int
    memory_bytes: int


class Load(Model):
    """The online load and how it came from the trace; the offline batch; the engines' flags."""

    trace: str
    trace_licence: str
    trace_start_s: float
    scaling: dict[str, float]
    online_requests: int
    context_tokens_mean: float
    output_tokens_mean: float
    offline_prompts: int
    offline_sequences: int
    offline_prompt_tokens: tuple[int, int]
    offline_output_tokens: tuple[int, int]
    engine_flags: dict[str, str | int | float]
    model: str
    device_memory_bytes: int
    memory_note: str
    identity_note: str


class Report(Model):
    schema_: Literal["valve.io/demo-report/v1"] = Field(default="valve.io/demo-report/v1", alias="schema")
    device: Literal["cpu"]
    versions: Versions
    machine: Machine
    command: str
    started: str = Field(description="UTC, ISO 8601")
    duration_s: float
    load: Load
    phases: Phases
    valve: ValvePhase | None = Field(default=None, description="the same object as phases.valve")
    ratios: Ratios
    promises: list[Promise]
    fault: str = Field(default="", description="a fault that was put in on purpose; empty in an honest run")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"
