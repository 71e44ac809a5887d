# SPDX-License-Identifier: Apache-2.0
"""The table and the verdict that the demo prints at its end.  Called by `main.py`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from valve_cli.demo.report import Figures, Phase, Report


def show(report: Report, console: Console) -> None:
    """Print the phases' figures and, line by line, which promises were kept."""
    phases = [
        (name, phase)
        for name in ("exclusive", "alone", "naive", "valve")
        if (phase := getattr(report.phases, name)) is not None
    ]
    table = Table(title=f"Valve demo on {report.device} ({report.machine.cpu}, {report.machine.cores} cores)")
    table.add_column("")
    for name, _ in phases:
        table.add_column(name, justify="right")
    for label, row in rows():
        table.add_row(label, *(row(phase) for _, phase in phases))
    console.print()
    console.print(table)
    valve = report.valve
    if valve:
        if valve.preempt_us:
            us = valve.preempt_us
            console.print(
                f"preemption: {valve.preemptions} times, {us.p50:.0f} µs p50, {us.p99:.0f} µs p99,"
                f" {us.max:.0f} µs max; at most {valve.max_preemptions_per_request} per online request"
            )
        console.print(
            f"reclaim: {valve.reclaims} of memory in use ({valve.reclaimed_bytes_in_use / 2**20:.0f} MiB),"
            f" {valve.offline_requests_recomputed} offline requests recomputed"
        )
    for promise in report.promises:
        mark = "[green]kept  [/]" if promise.kept else "[bold red]MISSED[/]"
        console.print(
            f"{mark}  {promise.name}: {promise.measured} (promised {promise.promise})", highlight=False
        )
    if report.fault:
        console.print(f"[bold yellow]a fault was put in on purpose: {report.fault}[/]")


def rows() -> list[tuple[str, Row]]:
    return [
        ("TTFT mean, ms", Row("ttft_ms", "mean")),
        ("TTFT p50, ms", Row("ttft_ms", "p50")),
        ("TTFT p99, ms", Row("ttft_ms", "p99")),
        ("TPOT mean, ms", Row("tpot_ms", "mean")),
        ("TPOT p50, ms", Row("tpot_ms", "p50")),
        ("TPOT p99, ms", Row("tpot_ms", "p99")),
        ("online requests", Row("online_requests")),
        ("online errors", Row("online_errors")),
        ("online busy, %", Row("online_busy_share")),
        ("offline tokens/s", Row("offline_tokens_per_s")),
    ]


class Row:
    """How one figure of a phase is written; a dash where the phase has none."""

    def __init__(self, field: str, statistic: str = "") -> None:
        self._field = field
        self._statistic = statistic

    def __call__(self, phase: Phase) -> str:
        value = getattr(phase, self._field)
        if isinstance(value, Figures):
            return f"{getattr(value, self._statistic):.1f}"
        online = self._field.startswith("online") or self._statistic
        if (
            value is None
            or (online and not phase.online_requests)
            or (not online and not phase.offline_sequences)
        ):
            return "–"
        if self._field == "online_busy_share":
            return f"{value * 100:.0f}"
        return f"{value:.1f}" if isinstance(value, float) else str(value)
