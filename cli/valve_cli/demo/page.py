# SPDX-License-Identifier: Apache-2.0
"""out/demo/report.html: one file, nothing loaded from elsewhere.

Assembles the report's figures and the pictures of `charts.py` into the template
`data/report.html`, whose style follows the reader's light or dark setting.  Called by
`main.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from valve_cli.demo import charts
from valve_cli.demo.measure import ValveRecord
from valve_cli.demo.phases import PhaseRecord
from valve_cli.demo.report import Figures, Phase, Report

TEMPLATE = Path(__file__).with_name("data") / "report.html"
NAMES = {
    "exclusive": "offline exclusive",
    "alone": "online alone",
    "naive": "both, naive",
    "valve": "both, Valve",
}
MIB = 1 << 20


def write_html(
    path: Path,
    report: Report,
    records: Mapping[str, PhaseRecord],
    valve: ValveRecord | None,
    slab_bytes: int,
) -> None:
    """Write the page; `records` and `valve` are the raw observations behind the report."""
    sections = [table(report)]
    if valve and report.valve:
        sections += valve_sections(report, valve, slab_bytes)
    if "naive" in records:
        sections.append(naive_section(records["naive"]))
    sections.append(distributions(records))
    if valve and report.valve and report.valve.preempt_us:
        sections.append(mechanics(valve))
    sections.append(method(report))
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title="Valve demo",
        subtitle=subtitle(report),
        fault=f'<p class="fault">A fault was put in on purpose: {escape(report.fault)}.</p>'
        if report.fault
        else "",
        cards=cards(report),
        promises=promises(report),
        sections="\n".join(sections),
    )
    path.write_text(page, encoding="utf-8")


def subtitle(report: Report) -> str:
    where = f"device <b>{report.device}</b> ({escape(report.machine.cpu)}, {report.machine.cores} cores)"
    versions = report.versions
    return (
        f"{where} · model {escape(report.load.model)} · vLLM {escape(versions.vllm)} ·"
        f" {escape(report.started[:16].replace('T', ' '))} UTC"
    )


def section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{text}</p>{body}</section>"


def cards(report: Report) -> str:
    """The few figures that matter, large."""
    ratios, valve = report.ratios, report.valve
    found: list[tuple[str, str, str]] = []

    def against(name: str, ours: float | None, theirs: float | None, label: str) -> None:
        if ours is not None:
            note = f"naive: {theirs:.2f}×" if theirs is not None else ""
            found.append((f"{ours:.2f}×", label, note))

    against(
        "ttft",
        ratios.ttft_mean_valve_over_alone,
        ratios.ttft_mean_naive_over_alone,
        "TTFT mean, against online alone",
    )
    against(
        "tpot",
        ratios.tpot_mean_valve_over_alone,
        ratios.tpot_mean_naive_over_alone,
        "TPOT mean, against online alone",
    )
    if ratios.offline_share_valve is not None:
        found.append((f"{ratios.offline_share_valve:.0%}", "of the offline rate that idle time allows", ""))
    if valve:
        us = valve.preempt_us
        found.append(
            (
                str(valve.max_preemptions_per_request),
                "preemption per online request at most",
                f"{valve.preemptions} in all, {us.p99:.0f} µs p99" if us else "",
            )
        )
        found.append(
            (
                f"{valve.reclaims}",
                "reclaims of memory in use",
                f"{valve.reclaimed_bytes_in_use / MIB:,.0f} MiB, {valve.offline_requests_recomputed} requests"
                " recomputed",
            )
        )
        same = "identical" if valve.offline_outputs_identical else "DIFFERENT"
        found.append(
            (
                same if valve.offline_requests_compared else "not compared",
                "offline outputs, token by token",
                f"{valve.offline_requests_compared} compared, {valve.offline_requests_lost} lost",
            )
        )
    return "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span>'
        f"<small>{escape(note)}</small></div>"
        for value, label, note in found
    )


def promises(report: Report) -> str:
    rows = "".join(
        f'<li class="{"kept" if p.kept else "missed"}"><b>{"kept" if p.kept else "missed"}</b>'
        f" {escape(p.name)}: {escape(p.measured)} <span>(promised: {escape(p.promise)})</span></li>"
        for p in report.promises
    )
    return f'<ul class="promises">{rows}</ul>' if rows else ""


def table(report: Report) -> str:
    """The phases side by side."""
    phases: list[tuple[str, Phase]] = [
        (name, phase) for name in NAMES if (phase := getattr(report.phases, name)) is not None
    ]

    def row(label: str, unit: str, cells: list[str]) -> str:
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        return f"<tr><th>{label} <small>{unit}</small></th>{body}</tr>"

    def statistic(field: str, name: str) -> list[str]:
        found = [getattr(phase, field) for _, phase in phases]
        return [f"{getattr(f, name):,.1f}" if isinstance(f, Figures) else "–" for f in found]

    rows = []
    for field, label in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT")):
        rows += [row(f"{label} {name}", "ms", statistic(field, name)) for name in ("mean", "p50", "p99")]
    online = [phase.online_requests > 0 for _, phase in phases]
    counts = [f"{p.online_requests} / {p.online_errors}" for _, p in phases]
    rows.append(row("online requests / errors", "", shown(counts, online)))
    rows.append(
        row("online busy", "% of time", shown([f"{p.online_busy_share:.0%}" for _, p in phases], online))
    )
    offline = [phase.offline_sequences > 0 for _, phase in phases]
    rates = [f"{p.offline_tokens_per_s:,.0f}" for _, p in phases]
    rows.append(row("offline", "tokens/s", shown(rates, offline)))
    head = "".join(f"<th>{NAMES[name]}</th>" for name, _ in phases)
    return section(
        "The phases, one run",
        "The same requests at the same times in every phase with an online engine; the same offline prompts"
        " in the same order in every phase with an offline engine.",
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>',
    )


def shown(cells: list[str], present: list[bool]) -> list[str]:
    return [cell if there else "–" for cell, there in zip(cells, present, strict=True)]


def valve_sections(report: Report, valve: ValveRecord, slab_bytes: int) -> list[str]:
    record, timeline = valve.phase, valve.timeline
    seconds = (record.window[1] - record.window[0]) / 1e9
    zoom = charts.busiest(record, timeline)
    keys = charts.legend(
        [
            ("fill-online", "an online request is in the engine"),
            ("fill-paused", "offline is paused"),
            ("fill-offline", "offline tokens/s"),
        ]
    )
    activity = section(
        "Valve: who computes",
        "Offline is paused from the arrival of an online request until the engine has been idle for T_cool,"
        " and computes in every gap.",
        keys
        + charts.lanes(record, timeline, (0.0, seconds), 12)
        + f"<h3>Its {zoom[1] - zoom[0]:.0f} s with the most pauses</h3>"
        + charts.lanes(record, timeline, zoom, 12),
    )
    keys = charts.legend(
        [
            ("fill-offline", "held by offline"),
            ("fill-online", "held by online"),
            ("free", "free"),
            ("reserve", "kept free for online (reservation)"),
            ("reclaim", "reclaim of offline memory in use"),
        ]
    )
    memory = section(
        "Valve: who has the memory",
        f"{report.load.device_memory_bytes // MIB:,} MiB in slabs of {slab_bytes / MIB:g} MiB. Online takes"
        " what a burst needs; the reservation grows when it falls short and shrinks in quiet times.",
        keys
        + charts.memory(record, timeline, report.load.device_memory_bytes // slab_bytes, slab_bytes / MIB),
    )
    return [activity, memory]


def naive_section(record: PhaseRecord) -> str:
    seconds = (record.window[1] - record.window[0]) / 1e9
    return section(
        "Naive, for comparison: both engines, no Valve",
        "The same load; nobody pauses offline, the cores are shared by the operating system.",
        charts.lanes(record, None, (0.0, seconds), 12),
    )


def distributions(records: Mapping[str, PhaseRecord]) -> str:
    ttft: dict[str, list[float]] = {}
    tpot: dict[str, list[float]] = {}
    for name in charts.COMPARED:
        if name in records:
            good = [r for r in records[name].requests if not r.error]
            ttft[name] = [v for r in good if (v := r.ttft_ms) is not None]
            tpot[name] = [v for r in good if (v := r.tpot_ms) is not None]
    keys = charts.legend([(f"key-{name}", NAMES[name]) for name in charts.COMPARED if name in records])
    body = charts.distribution(ttft, "time to first token (TTFT), ms")
    body += charts.distribution(tpot, "time per output token (TPOT), ms")
    return section(
        "What online users feel",
        "Share of requests that were at least this fast; a line further left is better.",
        f'{keys}<div class="pair">{body}</div>',
    )


def mechanics(valve: ValveRecord) -> str:
    begin, end = valve.phase.window
    values = [us for t, us in valve.timeline.pauses if us is not None and begin <= t <= end]
    sizes = charts.reclaim_sizes(valve.timeline, valve.phase.window)
    return section(
        "What Valve's two actions cost",
        "Left: from the online engine's busy signal until no offline thread runs. Right: each reclaim of"
        " memory in use, from online's shortfall until it has the memory.",
        f'<div class="pair">{charts.latencies(values)}{sizes}</div>',
    )


def method(report: Report) -> str:
    load, versions = report.load, report.versions
    scaling = ", ".join(f"{name} {value:g}" for name, value in load.scaling.items())
    flags = ", ".join(f"{name} {value}" for name, value in load.engine_flags.items())
    rows = [
        ("online load", f"{load.trace} ({load.trace_licence}), from second {load.trace_start_s:g} of it,"
         f" {load.online_requests} requests; prompts {load.context_tokens_mean:.0f} tokens on average,"
         f" answers {load.output_tokens_mean:.0f}"),
        ("scaling of the trace", scaling),
        ("offline batch", f"{load.offline_prompts} prompts of {load.offline_prompt_tokens[0]} to"
         f" {load.offline_prompt_tokens[1]} tokens, answers of {load.offline_output_tokens[0]} to"
         f" {load.offline_output_tokens[1]}; {load.offline_sequences} requests kept in the engine"),
        ("memory", load.memory_note),
        ("outputs", load.identity_note),
        ("engines", flags),
        ("TTFT, TPOT", "seen by the client, CLOCK_MONOTONIC; TPOT = (last − first token) / (tokens − 1)"),
        ("versions", f"valve {versions.valve} at {versions.commit}, vLLM {versions.vllm},"
         f" torch {versions.torch}, Python {versions.python}, Linux {versions.kernel}"),
        ("command", f"<code>{escape(report.command)}</code>, {report.duration_s / 60:.1f} min"),
    ]  # fmt: skip
    body = "".join(
        f"<dt>{name}</dt><dd>{text if name == 'command' else escape(text)}</dd>" for name, text in rows
    )
    return section("How it was measured", "", f"<dl>{body}</dl>")
