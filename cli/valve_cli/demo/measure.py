# SPDX-License-Identifier: Apache-2.0
"""Makes the report's figures out of what the phases saw.

Pure: records and events in, report models out.  Called by `main.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from valve_cli.demo.errors import MeasurementError
from valve_cli.demo.events import Timeline
from valve_cli.demo.phases import PhaseRecord
from valve_cli.demo.report import Figures, Phase, Phases, PreemptFigures, Promise, Ratios, ValvePhase
from valve_cli.demo.stats import (
    Summary,
    account,
    compare_outputs,
    covered_share,
    pauses_within,
    tokens_between,
)

TTFT_PROMISE = 1.05
TPOT_PROMISE = 1.02
OFFLINE_PROMISE = 0.90


@dataclass
class ValveRecord:
    """The Valve phase: the engines' side, the agent's events, the engine's own counters."""

    phase: PhaseRecord
    timeline: Timeline = field(default_factory=Timeline)
    requests_recomputed: int = 0
    tokens_recomputed: int = 0


def figures(values: Sequence[float]) -> Figures | None:
    summary = Summary.of(values)
    return Figures(**summary.__dict__) if summary else None


def phase_report(record: PhaseRecord) -> Phase:
    """Figures of a phase; requests that failed count as errors and not in the times."""
    seconds = (record.window[1] - record.window[0]) / 1e9
    if seconds <= 0:
        raise MeasurementError(f"the phase {record.name} lasted {seconds} s")
    good = [r for r in record.requests if not r.error]
    tokens = sum(r.received_tokens for r in good)
    return Phase(
        ttft_ms=figures([v for r in good if (v := r.ttft_ms) is not None]),
        tpot_ms=figures([v for r in good if (v := r.tpot_ms) is not None]),
        online_requests=len(record.requests),
        online_errors=len(record.requests) - len(good),
        online_busy_share=covered_share([(r.sent_ns, r.end_ns) for r in record.requests], record.window),
        offline_tokens_per_s=tokens_between(record.offline_samples, record.window) / seconds,
        duration_s=seconds,
        online_output_tokens=tokens,
        online_output_tokens_per_s=tokens / seconds,
        offline_requests_finished=sum(
            1 for e in record.offline_finished if record.window[0] <= e["t_ns"] <= record.window[1]
        ),
        offline_sequences=record.offline_sequences,
    )


def references(exclusive: PhaseRecord | None) -> dict[int, list[int]]:
    """The first output of every prompt in the exclusive phase."""
    found: dict[int, list[int]] = {}
    for event in exclusive.offline_finished if exclusive else ():
        found.setdefault(event["prompt"], event["tokens"])
    return found


def valve_report(record: ValveRecord, exclusive: PhaseRecord | None) -> ValvePhase:
    """Figures of the Valve phase.  Every finished offline request is compared with the
    reference of its prompt, also those that ended while the phase filled or drained."""
    phase, timeline = record.phase, record.timeline
    begin, end = phase.window
    base = phase_report(phase)
    pauses = [(t, latency) for t, latency in timeline.pauses if begin <= t <= end]
    latencies = [latency for _, latency in pauses if latency is not None]
    reclaims = [r for r in timeline.reclaims if begin <= r.t_ns <= end]
    in_use = [r for r in reclaims if r.bytes_in_use > 0]
    per_request = pauses_within([t for t, _ in pauses], [(r.sent_ns, r.end_ns) for r in phase.requests])
    comparison = compare_outputs(
        references(exclusive), [(e["id"], e["prompt"], e["tokens"]) for e in phase.offline_finished]
    )
    books = account(
        list(phase.offline_issued), [e["id"] for e in phase.offline_finished], phase.offline_aborted
    )
    preempt = Summary.of(latencies)
    return ValvePhase(
        **base.model_dump(),
        max_preemptions_per_request=max(per_request, default=0),
        preemptions=len(pauses),
        preempt_us=PreemptFigures(p50=preempt.p50, p99=preempt.p99, max=preempt.max) if preempt else None,
        reclaims=len(in_use),
        reclaims_all=len(reclaims),
        reclaimed_bytes_in_use=sum(r.bytes_in_use for r in reclaims),
        reclaimed_bytes=sum(r.bytes for r in reclaims),
        reclaim_us=figures([r.duration_us for r in reclaims]),
        offline_requests_recomputed=record.requests_recomputed,
        offline_tokens_recomputed=record.tokens_recomputed,
        offline_requests_compared=comparison.compared,
        offline_outputs_identical=comparison.all_identical,
        offline_first_difference=comparison.first_difference,
        offline_requests_lost=books.lost,
        offline_requests_duplicated=books.duplicated,
        offline_paused_share=covered_share(timeline.paused_spans(end), phase.window),
    )


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def ratios(phases: Phases) -> Ratios:
    """Every ratio whose two sides were measured."""

    def side(phase: Phase | None, name: str, statistic: str) -> float | None:
        found: Figures | None = getattr(phase, name) if phase else None
        return getattr(found, statistic) if found else None

    values: dict[str, float | None] = {}
    for name in ("ttft", "tpot"):
        for statistic in ("mean", "p99"):
            for which, phase in (("valve", phases.valve), ("naive", phases.naive)):
                values[f"{name}_{statistic}_{which}_over_alone"] = over(
                    side(phase, f"{name}_ms", statistic), side(phases.alone, f"{name}_ms", statistic)
                )
    exclusive = phases.exclusive.offline_tokens_per_s if phases.exclusive else None
    if phases.valve and exclusive is not None:
        idle = 1 - phases.valve.online_busy_share
        values["offline_share_valve"] = over(phases.valve.offline_tokens_per_s, exclusive * idle)
        values["offline_over_exclusive_valve"] = over(phases.valve.offline_tokens_per_s, exclusive)
    if phases.naive and exclusive is not None:
        values["offline_over_exclusive_naive"] = over(phases.naive.offline_tokens_per_s, exclusive)
    return Ratios(**values)


def promises(phases: Phases, found: Ratios) -> list[Promise]:
    """What Valve promises against what this run showed; only what the run could show."""
    rows: list[Promise] = []

    def promise(name: str, text: str, measured: str, kept: bool) -> None:
        rows.append(Promise(name=name, promise=text, measured=measured, kept=kept))

    def ratio(name: str, value: float | None, limit: float, text: str, at_most: bool = True) -> None:
        if value is not None:
            kept = value <= limit if at_most else value >= limit
            promise(name, f"{'≤' if at_most else '≥'} {limit:.2f} {text}", f"{value:.3f}", kept)

    valve = phases.valve
    ratio("TTFT mean", found.ttft_mean_valve_over_alone, TTFT_PROMISE, "× alone")
    ratio("TPOT mean", found.tpot_mean_valve_over_alone, TPOT_PROMISE, "× alone")
    ratio(
        "offline tokens/s",
        found.offline_share_valve,
        OFFLINE_PROMISE,
        "× exclusive rate × idle share",
        at_most=False,
    )
    if valve:
        promise(
            "preemptions per online request",
            "≤ 1",
            f"{valve.max_preemptions_per_request} at most, {valve.online_requests} requests",
            valve.max_preemptions_per_request <= 1,
        )
        promise("online errors", "0", str(valve.online_errors), valve.online_errors == 0)
        if phases.exclusive:
            promise(
                "offline outputs",
                "token-identical to the exclusive phase",
                f"{valve.offline_requests_compared} compared, "
                + ("all identical" if valve.offline_outputs_identical else valve.offline_first_difference),
                valve.offline_outputs_identical,
            )
        promise(
            "offline requests lost or doubled",
            "0",
            f"{valve.offline_requests_lost} lost, {valve.offline_requests_duplicated} doubled",
            valve.offline_requests_lost == 0 and valve.offline_requests_duplicated == 0,
        )
        if valve.preempt_us:
            p99 = valve.preempt_us.p99
            promise("preemption latency p99", "< 1 ms", f"{p99:.0f} µs", p99 < 1000)
    return rows
