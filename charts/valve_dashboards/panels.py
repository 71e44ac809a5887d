# SPDX-License-Identifier: Apache-2.0
"""What a dashboard is here: panels on a grid, each a question with its queries.

Why it exists: one description makes Grafana's JSON (grafana.py), is executed against a real Prometheus by
the tests, and is drawn into docs/dashboards (draw.py), so that the three cannot drift apart.

Threading model: immutable values. Callers: boards.py, grafana.py, draw.py, the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

COLUMNS = 24
"""Of Grafana's grid."""


class Kind(StrEnum):
    STAT = "stat"
    LINES = "timeseries"
    STACKED = "stacked"
    STATES = "state-timeline"
    HEATMAP = "heatmap"
    TABLE = "table"


class Unit(StrEnum):
    """Grafana's names."""

    SECONDS = "s"
    BYTES = "bytes"
    SHARE = "percentunit"
    COUNT = "short"
    PER_SECOND = "ops"
    TOKENS = "tokens/s"
    BOOL = "bool"


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str = ""
    """Grafana's template: {{node}}."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    description: str
    """What it answers, and what to do when it looks bad."""
    kind: Kind
    unit: Unit
    width: int
    height: int
    queries: tuple[Query, ...]
    threshold: float | None = None
    """Above it the value is bad."""
    exporter: str = "agent"
    """Who serves the metrics: the agent, or an engine (`vllm`) that is scraped beside it."""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    label: str
    query: str
    """label_values(...)"""


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a panel or a row's title stands on the grid."""

    x: int
    y: int
    width: int
    height: int


def layout(board: Board) -> list[tuple[Row | Panel, Place]]:
    """Rows from top to bottom, panels from left to right, wrapped at the grid's width."""
    placed: list[tuple[Row | Panel, Place]] = []
    y = 0
    for row in board.rows:
        placed.append((row, Place(0, y, COLUMNS, 1)))
        y += 1
        x = line_height = 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, line_height = 0, y + line_height, 0
            placed.append((panel, Place(x, y, panel.width, panel.height)))
            x += panel.width
            line_height = max(line_height, panel.height)
        y += line_height
    return placed


def executable(expr: str, values: Mapping[str, str], rate_interval: str) -> str:
    """The query as Grafana would send it: variables and intervals filled in."""
    text = expr.replace("$__rate_interval", rate_interval)
    for name, value in values.items():
        text = re.sub(rf"\$\{{?{name}\b\}}?", value, text)
    if "$" in text:
        raise ValueError(f"{text}: no value for a variable; known are {', '.join(values)}")
    return text
