# SPDX-License-Identifier: Apache-2.0
"""Every alert is raised by what it is for and by nothing else: promtool's unit tests, from a table."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "charts" / "valve" / "rules" / "valve.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks"
AGENT = {"node": "n1", "instance": "n1:9400"}
DEVICE = {**AGENT, "device": "cpu"}
OFFLINE = {**DEVICE, "tenant": "batch/a", "workload": "offline"}
ONLINE = {**DEVICE, "tenant": "chat/a", "workload": "online"}
Series = tuple[str, dict[str, str], str]
"""Metric, labels, values at one a minute in promtool's notation."""


@dataclass(frozen=True, slots=True)
class Case:
    description: str
    alert: str
    series: tuple[Series, ...]
    at: str
    raised: dict[str, str] | None
    """The alert's labels; None: it must not be raised."""


def latency(within_1ms: int, all_of_them: int) -> tuple[Series, ...]:
    name = "valve_preemption_latency_seconds"
    buckets = {"0.0005": within_1ms, "0.001": within_1ms, "0.005": all_of_them, "+Inf": all_of_them}
    return (
        *((f"{name}_bucket", {**DEVICE, "le": le}, f"0+{count}x60") for le, count in buckets.items()),
        (f"{name}_count", DEVICE, f"0+{all_of_them}x60"),
    )


def wants(held: int, wanted: int) -> tuple[Series, ...]:
    return (
        ("valve_tenant_memory_bytes", ONLINE, f"{held}x30"),
        ("valve_tenant_memory_wanted_bytes", ONLINE, f"{wanted}x30"),
    )


def recomputes(tokens: int) -> tuple[Series, ...]:
    return (
        ("valve_tenant_recomputed_tokens_total", OFFLINE, f"0+{tokens}x90"),
        ("valve_tenant_tokens_total", OFFLINE, "0+1000x90"),
    )


def paused(seconds_per_minute: int, processes: int) -> tuple[Series, ...]:
    return (
        ("valve_offline_paused_seconds_total", DEVICE, f"0+{seconds_per_minute}x90"),
        ("valve_tenant_processes", OFFLINE, f"{processes}x90"),
    )


UPTIME, REJECTS = "valve_agent_uptime_seconds", "valve_rejects_total"
ON_DEVICE = {"node": "n1", "device": "cpu"}
CASES = [
    Case("one in ten stops is slow", "ValvePreemptionSlow", latency(90, 100), "30m", ON_DEVICE),
    Case("all stops are fast", "ValvePreemptionSlow", latency(100, 100), "30m", None),
    Case("slow, but hardly ever", "ValvePreemptionSlow", latency(0, 1), "30m", None),
    *(
        Case(description, alert, ((metric, DEVICE, values),), "15m", raised)
        for alert, metric in (
            ("ValvePauseNotConfirmed", "valve_pause_timeouts_total"),
            ("ValvePauseBroken", "valve_pause_violations_total"),
            ("ValveProcessKilled", "valve_kills_total"),
        )
        for description, values, raised in (
            ("it happened", "0x10 1x10", DEVICE),
            ("it never happened", "0x30", None),
        )
    ),
    Case("more than it has", "ValveOnlineWaitsForMemory", wants(100, 200), "10m", ON_DEVICE),
    Case("it has what it wants", "ValveOnlineWaitsForMemory", wants(200, 200), "10m", None),
    *(
        Case(description, "ValveOfflineGrowthStopped", (("valve_offline_growth_stopped", DEVICE, values),),
             "20m", raised)
        for description, values, raised in (("for long", "1x30", DEVICE), ("for a minute", "0x18 1x2", None))
    ),
    Case("a third twice", "ValveReclaimsCostTooMuch", recomputes(333), "60m", ON_DEVICE),
    Case("a tenth twice", "ValveReclaimsCostTooMuch", recomputes(100), "60m", None),
    Case("stopped all the time", "ValveOfflineStarved", paused(60, 1), "60m", DEVICE),
    Case("stopped half the time", "ValveOfflineStarved", paused(30, 1), "60m", None),
    Case("stopped, but nobody is there", "ValveOfflineStarved", paused(60, 0), "60m", None),
    Case("gone", "ValveAgentSilent", ((UPTIME, AGENT, "0+60x10 _x20"),), "20m", AGENT),
    Case("it reports", "ValveAgentSilent", ((UPTIME, AGENT, "0+60x30"),), "20m", None),
    Case("again and again", "ValveAgentRestarts", ((UPTIME, AGENT, " ".join(["0+60x9"] * 5)),), "45m", AGENT),
    Case("it runs", "ValveAgentRestarts", ((UPTIME, AGENT, "0+60x60"),), "45m", None),
    *(
        Case(description, alert, ((metric, AGENT, values),), at, raised)
        for alert, metric in (
            ("ValveSettingsNotFollowed", "valve_settings_followed"),
            ("ValveApiserverUnreachable", "valve_apiserver_connected"),
            ("ValveKubeletUnreachable", "valve_kubelet_connected"),
        )
        for description, values, at, raised in (
            ("for long", "0x40", "30m", AGENT),
            ("for a moment", "1x20 0x3", "22m", None),
        )
    ),
    Case("it knocks on and on", "ValvePeersRefused", ((REJECTS, AGENT, "0+10x60"),), "50m", AGENT),
    Case("a few were too early", "ValvePeersRefused", ((REJECTS, AGENT, "0 0 5x60"),), "50m", None),
]  # fmt: skip


def rules() -> dict[str, dict[str, Any]]:
    document = yaml.safe_load(RULES.read_text())
    return {rule["alert"]: rule for group in document["groups"] for rule in group["rules"]}


def as_promtool(case: Case, severity: str) -> dict[str, Any]:
    def selector(name: str, labels: dict[str, str]) -> str:
        return name + "{" + ",".join(f"{key}={json.dumps(value)}" for key, value in labels.items()) + "}"

    raised = [] if case.raised is None else [{"exp_labels": {**case.raised, "severity": severity}}]
    return {
        "name": f"{case.alert}: {case.description}",
        "interval": "1m",
        "input_series": [
            {"series": selector(name, labels), "values": values} for name, labels, values in case.series
        ],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": raised}],
    }


def test_each_alert_is_raised_by_what_it_is_for_and_by_nothing_else(promtool: Path, tmp_path: Path) -> None:
    """Without their sentences, which promtool would compare word by word."""
    document = yaml.safe_load(RULES.read_text())
    for group in document["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(document))
    known = rules()
    tests = {
        "rule_files": ["rules.yaml"], "evaluation_interval": "1m",
        "tests": [as_promtool(case, known[case.alert]["labels"]["severity"]) for case in CASES],
    }  # fmt: skip
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        [promtool, "test", "rules", "tests.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong_with_the_rules(promtool: Path) -> None:
    done = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_both_kinds_of_case() -> None:
    for alert in rules():
        kinds = {case.raised is not None for case in CASES if case.alert == alert}
        assert kinds == {True, False}, f"{alert} is not tested both ways"


def test_every_alert_has_a_severity_a_sentence_and_a_runbook() -> None:
    for alert, rule in rules().items():
        assert rule["labels"]["severity"] in ("info", "warning", "critical"), alert
        assert rule["annotations"]["summary"], alert
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{alert}.md"
        text = (RUNBOOKS / f"{alert}.md").read_text()
        for part in (f"# {alert}\n", "**Effect.**", "## Look\n", "## Do\n"):
            assert part in text, f"{alert}.md has no {part!r}"
    pages = {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == set(rules()), "a runbook without an alert, or the other way round"
    index = (RUNBOOKS / "README.md").read_text()
    assert set(re.findall(r"\((Valve\w+)\.md\)", index)) == pages
