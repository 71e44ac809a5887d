# SPDX-License-Identifier: Apache-2.0
"""The dashboards that are committed are those that are generated, and they use metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from valve_agent.gate_stats import BUCKETS_US, COUNTERS
from valve_agent.metrics import Collector
from valve_dashboards.__main__ import FOLDER, files
from valve_dashboards.boards import BOARDS
from valve_dashboards.draw import legend_of, text_of
from valve_dashboards.panels import COLUMNS, Board, Unit, executable, layout

ROOT = Path(__file__).resolve().parents[3]
TENANT: dict[str, Any] = {
    "role": "online", "labels": {}, "limit_slabs": 4, "held_slabs": 1, "want_slabs": 2, "decode_gap_ns": 10,
    "processes": [{"pid": 1, "busy": True}], "requests": 1, "tokens": 2, "recomputed": 0, "lost_blocks": 0,
    "recomputed_tokens": 0,
}  # fmt: skip
GPU: dict[str, Any] = {
    "id": "cpu", "device": "cpu", "policy": "p", "uptime_s": 1.0, "killed": 0, "offline_paused": True,
    "growth_stopped": False, "gate": dict.fromkeys(COUNTERS, 0),
    "reclaims": {"total": 0, "bytes": 0, "bytes_in_use": 0, "requests_harmed": 0, "in_flight": False},
    "usage_s": {"online_busy": 0.0, "offline_paused": 0.0},
    "preempt_buckets_us": dict.fromkeys([*map(str, BUCKETS_US), "inf"], 0),
    "slabs": {"bytes_each": 2, "total": 8, "free": 4, "reservation": 1, "online_floor": 0},
    "tenants": {"on": TENANT, "off": {**TENANT, "role": "offline"}},
}  # fmt: skip
STATUS: dict[str, Any] = {
    "gpus": [GPU], "rejects": 0, "unusable": {},
    "cluster": {"api_error": "", "kubelet_error": "", "ready": True, "generation": 1, "status_writes": 1},
}  # fmt: skip


def exported() -> set[str]:
    """Names of all time series that an agent on a node has."""
    collector, registry = Collector(), CollectorRegistry()
    collector.publish(STATUS)
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def used(text: str) -> set[str]:
    return set(re.findall(r"\bvalve_[a-z0-9_]+", text))


def test_what_is_committed_is_what_is_generated() -> None:
    wanted = files()
    for path, text in wanted.items():
        assert path.read_text() == text, f"{path.name} is out of date: run `python -m valve_dashboards`"
    assert set(FOLDER.iterdir()) == set(wanted), "a dashboard that nothing generates"


def test_queries_and_alerts_use_only_metrics_that_exist() -> None:
    rules = yaml.safe_load((ROOT / "charts/valve/rules/valve.yaml").read_text())
    panels = [panel for board in BOARDS for panel in board.panels if panel.exporter == "agent"]
    texts = [query.expr for panel in panels for query in panel.queries]
    texts += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    texts += [variable.query for board in BOARDS for variable in board.variables]
    unknown = used(" ".join(texts)) - exported()
    assert unknown == set()


def test_the_document_names_every_metric_and_no_other() -> None:
    named = {name.removesuffix("_total") for name in used((ROOT / "docs" / "monitoring.md").read_text())}
    suffixes = ("_total", "_bucket", "_count", "_sum")
    families = set()
    for name in exported():
        for suffix in suffixes:
            name = name.removesuffix(suffix)
        families.add(name)
    assert named - {"valve_dashboards"} == families


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_every_panel_says_what_it_is_for(board: Board) -> None:
    assert len({panel.title for panel in board.panels}) == len(board.panels)
    for panel in board.panels:
        assert len(panel.description) > 5
        assert panel.queries
        assert 0 < panel.width <= COLUMNS


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_panels_do_not_overlap_and_stay_on_the_grid(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for _, place in layout(board):
        cells = {(x, y) for x in range(place.x, place.x + place.width)
                 for y in range(place.y, place.y + place.height)}  # fmt: skip
        assert not cells & taken
        assert place.x + place.width <= COLUMNS
        taken |= cells


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_json_is_what_grafana_needs(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["uid"] == path.stem
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    names = {variable["name"] for variable in document["templating"]["list"]}
    assert "datasource" in names
    for panel in document["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            variables = set(re.findall(r"\$(?!__)\{?(\w+)", target["expr"]))
            assert variables <= names, "a variable that the dashboard does not have"


def test_variables_are_filled_in() -> None:
    text = executable('rate(x{node=~"$node",n="${node}"}[$__rate_interval])', {"node": "a"}, "10s")
    assert text == 'rate(x{node=~"a",n="a"}[10s])'
    with pytest.raises(ValueError, match="no value for a variable"):
        executable("x{device=~'$device'}", {"node": "a"}, "10s")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.00048, Unit.SECONDS, "480 µs"),
        (0.0012, Unit.SECONDS, "1.2 ms"),
        (90.0, Unit.SECONDS, "90 s"),
        (64 << 20, Unit.BYTES, "64 MiB"),
        (0, Unit.BYTES, "0"),
        (0.125, Unit.SHARE, "12.5 %"),
        (float("nan"), Unit.COUNT, "no data"),
        (1, Unit.BOOL, "yes"),
        (1234.0, Unit.TOKENS, "1,234 tok/s"),
    ],
)
def test_numbers_are_drawn_with_their_units(value: float, unit: Unit, text: str) -> None:
    assert text_of(value, unit) == text


def test_legends_are_filled_in_like_grafanas() -> None:
    assert legend_of("{{tenant}} wants", {"tenant": "a/b"}) == "a/b wants"
    assert legend_of("", {"b": "2", "a": "1"}) == "a=1, b=2"
