# SPDX-License-Identifier: Apache-2.0
"""Every query of every dashboard, executed against a Prometheus that scraped agents at work."""

from __future__ import annotations

import json
import math
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from busy_nodes import Run

from valve_dashboards.boards import BOARDS
from valve_dashboards.draw import draw_boards
from valve_dashboards.panels import Board, Kind, Panel, executable

ROOT = Path(__file__).resolve().parents[3]
RATE = "10s"
ALL = {"node": ".*", "device": ".*", "policy": ".*"}
ONE = {"node": "gpu-node-1", "device": "cpu", "policy": "inference"}
CASES = [(board, panel) for board in BOARDS for panel in board.panels if panel.exporter == "agent"]
"""The others are executed in the engines lane (tests/engines/engine_panels.py)."""


def results(run: Run, panel: Panel, values: dict[str, str]) -> list[list[dict[str, Any]]]:
    """For each query its matrix over the run (one point at its end for what shows only the last value)."""
    found = []
    for query in panel.queries:
        expr = executable(query.expr, values, RATE)
        if panel.kind in (Kind.STAT, Kind.TABLE):
            vector = run.prometheus.query(expr, run.end)
            found.append([{"metric": one["metric"], "values": [one["value"]]} for one in vector])
        else:
            found.append(run.prometheus.query_range(expr, run.start + 10, run.end, 1))
    return found


@pytest.mark.parametrize(("board", "panel"), CASES, ids=[f"{b.uid}-{p.title}" for b, p in CASES])
def test_no_panel_is_empty(run: Run, board: Board, panel: Panel) -> None:
    for query, series in zip(panel.queries, results(run, panel, ALL), strict=True):
        numbers = [float(value) for one in series for _, value in one["values"]]
        assert numbers, f"{query.expr} gives no series"
        assert not all(math.isnan(number) for number in numbers), f"{query.expr} gives only NaN"


def test_what_must_have_happened_is_shown(run: Run) -> None:
    """A panel of zeroes is not empty, yet shows nothing: these moved."""
    for expr in (
        "sum(increase(valve_preemptions_total[1m]))",
        "sum(increase(valve_reclaims_total[1m]))",
        "sum(increase(valve_reclaimed_in_use_bytes_total[1m]))",
        'sum(increase(valve_tenant_tokens_total{workload="online"}[1m]))',
        'sum(increase(valve_tenant_tokens_total{workload="offline"}[1m]))',
        "sum(increase(valve_tenant_lost_blocks_total[1m]))",
        "sum(increase(valve_tenant_recomputed_tokens_total[1m]))",
        "sum(increase(valve_online_busy_seconds_total[1m]))",
        "max(valve_tenant_decode_gap_seconds)",
        "sum(valve_settings_followed) - 1",
    ):
        (one,) = run.prometheus.query(expr, run.end)
        assert float(one["value"][1]) > 0, expr


def test_memory_adds_up_to_the_devices(run: Run) -> None:
    expr = (
        "sum by (node) (valve_tenant_memory_bytes) + sum by (node) (valve_device_free_bytes) "
        "- sum by (node) (valve_device_memory_bytes)"
    )
    values = [float(value) for one in run.prometheus.query_range(expr, run.start, run.end, 1)
              for _, value in one["values"]]  # fmt: skip
    assert values
    assert set(values) == {0.0}


def test_paused_and_busy_time_are_exact(run: Run) -> None:
    """Offline is stopped whenever online is busy, so for at least as long; and never longer than time."""
    for (busy,), (paused,) in zip(
        ([one["value"][1]] for one in run.prometheus.query("valve_online_busy_seconds_total", run.end)),
        ([one["value"][1]] for one in run.prometheus.query("valve_offline_paused_seconds_total", run.end)),
        strict=True,
    ):
        assert 1 < float(busy) < float(paused) + 0.5
    shares = run.prometheus.query_range(
        "rate(valve_offline_paused_seconds_total[10s])", run.start + 10, run.end, 1
    )
    assert all(float(value) <= 1.2 for one in shares for _, value in one["values"])


def test_pods_are_labels(run: Run) -> None:
    (one,) = run.prometheus.query(
        'valve_tenant_memory_bytes{node="gpu-node-1",tenant_namespace="chat",tenant_container="engine"}',
        run.end,
    )
    assert one["metric"]["tenant"] == "chat/vllm-1"
    assert one["metric"]["tenant_pod"] == "vllm-1"


def test_promtool_finds_nothing_wrong_with_the_metrics(run: Run, programs: Path) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{run.ports['gpu-node-1']}/metrics", timeout=10) as answer:
        text = answer.read()
    done = subprocess.run([programs / "promtool", "check", "metrics"], input=text, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert done.stderr == b""


def test_the_panels_can_be_drawn(run: Run, tmp_path: Path) -> None:
    """What docs/dashboards shows: `python -m valve_dashboards.draw out/dashboards/results.json`."""
    document = {
        board.uid: [results(run, panel, ALL if board.uid in ("valve-fleet", "valve-policy") else ONE)
                    for panel in board.panels]
        for board in BOARDS
    }  # fmt: skip
    out = ROOT / "out" / "dashboards"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(document))
    drawn = draw_boards(document, tmp_path)
    assert [path.name for path in drawn] == [f"{board.uid}.png" for board in BOARDS]
    assert all(path.stat().st_size > 20_000 for path in drawn)
