# SPDX-License-Identifier: Apache-2.0
"""The panels of an engine's own metrics, executed against a Prometheus that scrapes a real engine."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tests/integration/monitoring", "tools", "charts"):
    sys.path.insert(0, str(ROOT / folder))

import get_prometheus  # noqa: E402
from prometheus_live import Prometheus  # noqa: E402

from valve_cli.bench.rig import wait_for  # noqa: E402
from valve_dashboards.boards import BOARDS  # noqa: E402
from valve_dashboards.panels import executable  # noqa: E402

RATE = "30s"
ALL = {"node": ".*", "device": ".*", "policy": ".*"}


def check(exporter: str, port: int, folder: Path, request: Callable[[], object]) -> None:
    """`request` makes the engine serve one request. Fails on a panel without a number."""
    programs = get_prometheus.folder(get_prometheus.default_cache())
    queries = [
        query.expr
        for board in BOARDS
        for panel in board.panels
        if panel.exporter == exporter
        for query in panel.queries
    ]
    assert queries
    with Prometheus(programs, folder, {"engine": port}) as prometheus:
        wait_for("a first scrape", lambda: prometheus.query("up == 1"))
        for _ in range(3):
            request()
            time.sleep(1.1)

        def answered() -> bool:
            return all(
                any(not math.isnan(float(one["value"][1])) for one in prometheus.query(text))
                for text in (executable(expr, ALL, RATE) for expr in queries)
            )

        wait_for("every panel of the engine to have a number", answered, 30)
