# SPDX-License-Identifier: Apache-2.0
"""From a made-up run to report.json and report.html: keys, figures, broken promises, one file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up import SLABS, whole_run
from rich.console import Console

from valve_cli.demo import measure, summary
from valve_cli.demo.measure import ValveRecord
from valve_cli.demo.page import write_html
from valve_cli.demo.phases import PhaseRecord
from valve_cli.demo.report import Load, Machine, Phases, Report, Versions

STATISTICS = {"mean", "p50", "p99"}
PHASE_KEYS = {
    "ttft_ms", "tpot_ms", "online_requests", "online_errors", "online_busy_share", "offline_tokens_per_s",
}  # fmt: skip
VALVE_KEYS = {
    "max_preemptions_per_request", "preemptions", "preempt_us", "reclaims", "reclaimed_bytes_in_use",
    "offline_requests_recomputed", "offline_outputs_identical", "offline_requests_lost",
}  # fmt: skip


def report_of(records: dict[str, PhaseRecord], valve: ValveRecord) -> Report:
    phase = measure.valve_report(valve, records["exclusive"])
    made = {name: measure.phase_report(record) for name, record in records.items() if name != "valve"}
    phases = Phases(**made, valve=phase)
    ratios = measure.ratios(phases)
    return Report(
        device="cpu",
        versions=Versions(valve="0", commit="c", python="3", vllm="v", torch="t", kernel="k"),
        machine=Machine(cpu="a <cpu> & more", cores=2, memory_bytes=1 << 34),
        command="valve demo",
        started="2026-01-01T00:00:00+00:00",
        duration_s=600,
        load=Load(
            trace="t.csv",
            trace_licence="CC-BY-4.0",
            trace_start_s=40,
            scaling={"time": 4.5},
            online_requests=120,
            context_tokens_mean=500,
            output_tokens_mean=25,
            offline_prompts=40,
            offline_sequences=160,
            offline_prompt_tokens=(96, 256),
            offline_output_tokens=(32, 96),
            engine_flags={"block_size": 32},
            model="m",
            device_memory_bytes=SLABS << 21,
            memory_note="",
            identity_note="",
        ),
        phases=phases,
        valve=phase,
        ratios=ratios,
        promises=measure.promises(phases, ratios),
    )


def test_the_report_has_the_promised_keys() -> None:
    document = json.loads(report_of(*whole_run()).to_json())
    assert {"device", "versions", "command", "phases", "valve"} <= document.keys()
    assert document["device"] == "cpu"
    assert document["phases"].keys() == {"exclusive", "alone", "naive", "valve"}
    for name, phase in document["phases"].items():
        assert phase.keys() >= PHASE_KEYS, name
        for field in ("ttft_ms", "tpot_ms"):
            assert name == "exclusive" or phase[field].keys() >= STATISTICS
    assert document["valve"].keys() >= VALVE_KEYS
    assert document["valve"]["preempt_us"].keys() == {"p50", "p99", "max"}
    assert document["valve"] == document["phases"]["valve"]


def test_a_report_read_back_is_the_same() -> None:
    report = report_of(*whole_run())
    assert Report.model_validate_json(report.to_json()) == report


def test_an_honest_run_keeps_its_promises() -> None:
    report = report_of(*whole_run())
    assert {p.name: p.kept for p in report.promises} == {p.name: True for p in report.promises}
    assert len(report.promises) == 8
    assert report.valve is not None
    assert report.valve.offline_outputs_identical
    assert report.valve.max_preemptions_per_request == 1


def test_a_wrong_token_a_lost_request_a_second_preemption_and_an_error_are_each_seen() -> None:
    records, valve = whole_run()
    phase = valve.phase
    phase.offline_finished[17]["tokens"][3] += 1
    phase.offline_issued["valve-99999"] = 0
    middle = (phase.requests[5].sent_ns + phase.requests[5].end_ns) // 2
    valve.timeline.pauses += [(middle, 100.0), (middle + 1, 100.0)]
    phase.requests[7].error = "HTTP 500"
    report = report_of(records, valve)
    assert {p.name for p in report.promises if not p.kept} == {
        "preemptions per online request",
        "online errors",
        "offline outputs",
        "offline requests lost or doubled",
    }
    assert report.valve is not None
    assert report.valve.offline_first_difference.startswith("request valve-00017")
    assert report.valve.online_errors == 1


def test_figures_of_a_phase() -> None:
    records, _ = whole_run()
    exclusive = measure.phase_report(records["exclusive"])
    assert exclusive.offline_tokens_per_s == pytest.approx(400)
    assert (exclusive.online_requests, exclusive.online_busy_share, exclusive.ttft_ms) == (0, 0, None)
    alone = measure.phase_report(records["alone"])
    requests = records["alone"].requests
    assert alone.ttft_ms is not None
    assert alone.ttft_ms.mean == pytest.approx(
        sum((r.first_ns - r.sent_ns) / 1e6 for r in requests) / len(requests)
    )
    assert alone.offline_tokens_per_s == 0


def test_only_what_lies_in_the_window_is_counted() -> None:
    records, valve = whole_run()
    begin, end = valve.phase.window
    before = measure.valve_report(valve, records["exclusive"])
    valve.timeline.pauses += [(begin - 2, 9e9), (end + 1, 9e9)]
    valve.timeline.resumes += [begin - 1]
    valve.timeline.reclaims.append(valve.timeline.reclaims[0].__class__(end + 5, 1, 1, 1, 1, 9e9))
    assert measure.valve_report(valve, records["exclusive"]) == before


class Links(HTMLParser):
    """Collects everything that would make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "img", "object"):
            self.found.append(tag)
        self.found += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    records, valve = whole_run()
    page = tmp_path / "report.html"
    write_html(page, report_of(records, valve), records, valve, 2 << 20)
    text = page.read_text()
    parser = Links()
    parser.feed(text)
    assert parser.found == []
    assert not re.search(r"url\(|@import|https?://", text)
    assert "$" not in text, "a placeholder of the template was not filled"
    assert "a &lt;cpu&gt; &amp; more" in text
    assert "NaN" not in text
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text)
    assert text.count("<svg") == 9


def test_a_page_without_the_valve_phase_can_be_drawn(tmp_path: Path) -> None:
    records, valve = whole_run()
    full = report_of(records, valve)
    del records["valve"], records["naive"]
    phases = Phases(exclusive=full.phases.exclusive, alone=full.phases.alone)
    report = full.model_copy(update={"phases": phases, "valve": None, "ratios": measure.ratios(phases)})
    write_html(tmp_path / "r.html", report, records, None, 2 << 20)
    assert "online alone" in (tmp_path / "r.html").read_text()


def test_the_summary_says_kept_and_missed() -> None:
    records, valve = whole_run()
    valve.phase.offline_finished[3]["tokens"].pop()
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    summary.show(report_of(records, valve), console)
    console.file.close()
    text = console.export_text()
    assert "kept    TTFT mean" in text
    assert "MISSED  offline outputs" in text
    assert "µs p99" in text
