# SPDX-License-Identifier: Apache-2.0
"""Draws a dashboard from Prometheus' answers, on the dashboard's own grid, with matplotlib.

Why it exists: the docs show what the dashboards look like, and no Grafana server runs where they are tested.
The pictures say so: they are rendered from Prometheus data, not by Grafana.

    python -m valve_dashboards.draw out/dashboards/results.json docs/dashboards

Threading model: none. Callers: main below, tests/integration/monitoring.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from valve_dashboards.boards import BOARDS
from valve_dashboards.panels import COLUMNS, Board, Kind, Panel, Row, Unit, layout

Matrix = Sequence[Mapping[str, Any]]
"""A query's answer: [{metric, values: [[t, "v"], …]}]."""

CELL_INCHES = (0.62, 0.40)
INK, MUTED, GRID, PAPER, CARD = "#1f2430", "#6b7280", "#e5e7eb", "#f4f5f7", "#ffffff"
COLOURS = ("#3274d9", "#2f9e60", "#e0820f", "#9a5bd0", "#d64545", "#12939a", "#8a6d3b", "#5f6b7a")
GOOD, BAD = "#2f9e60", "#d64545"
FIXED = {
    "online": "#2f9e60", "offline": "#3274d9", "kept for online": "#f2c14e", "free": "#d9dde3",
}  # fmt: skip
CAPTION = (
    "Rendered from Prometheus data, not Grafana. One minute of two `valve agent --node` on the cpu device "
    "with made-up traffic (tests/integration/monitoring); the figures show the dashboards, not GPUs."
)


def draw_boards(document: Mapping[str, Sequence[Sequence[Matrix]]], folder: Path) -> list[Path]:
    """One PNG per board. `document`: uid -> for each panel, for each query, its matrix."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for board in BOARDS:
        path = folder / f"{board.uid}.png"
        figure = draw_board(board, document[board.uid])
        figure.savefig(path, dpi=100, facecolor=PAPER, metadata={"Software": None})
        pyplot.close(figure)
        drawn.append(path)
    return drawn


def draw_board(board: Board, answers: Sequence[Sequence[Matrix]]) -> Figure:
    placed = layout(board)
    rows = max(place.y + place.height for _, place in placed)
    head, foot = 1.6, 1.3
    width, height = COLUMNS * CELL_INCHES[0], (rows + head + foot) * CELL_INCHES[1]
    figure: Figure = pyplot.figure(figsize=(width, height))
    total = rows + head + foot
    figure.text(0.008, 1 - 0.75 / total, board.title, size=15, weight="bold", color=INK, va="center")
    figure.text(0.19, 1 - 0.75 / total, board.description, size=10, color=MUTED, va="center")
    figure.text(0.008, 0.5 / total, CAPTION, size=8.5, color=MUTED, style="italic", va="center")
    remaining = iter(answers)
    for item, place in placed:
        left, bottom = place.x / COLUMNS, 1 - (head + place.y + place.height) / total
        wide, high = place.width / COLUMNS, place.height / total
        if isinstance(item, Row):
            figure.text(
                left + 0.008, bottom + high / 2, item.title, size=11, weight="bold", color=INK, va="center"
            )
            continue
        _card(figure, (left, bottom, wide, high))
        _panel(figure, item, next(remaining), (left, bottom, wide, high), place.height)
    return figure


def _card(figure: Figure, box: tuple[float, float, float, float]) -> None:
    left, bottom, wide, high = box
    card = pyplot.Rectangle(
        (left + 0.003, bottom + 0.002), wide - 0.006, high - 0.004, facecolor=CARD, edgecolor=GRID,
        transform=figure.transFigure, zorder=-1,
    )  # fmt: skip
    figure.add_artist(card)


def _panel(
    figure: Figure,
    panel: Panel,
    answers: Sequence[Matrix],
    box: tuple[float, float, float, float],
    rows: int,
) -> None:
    left, bottom, wide, high = box
    line = high / rows
    top = bottom + high
    figure.text(left + 0.010, top - 0.62 * line, panel.title, size=9.5, weight="bold", color=INK, va="center")
    series = [
        (legend_of(query.legend, one["metric"]), one["values"])
        for query, matrix in zip(panel.queries, answers, strict=True)
        for one in matrix
    ]
    if panel.kind is Kind.STAT:
        _stat(figure, panel, series, box)
        return
    if panel.kind is Kind.TABLE:
        _table(figure, panel, series, box, line)
        return
    inset = 0.045 if panel.kind is not Kind.STATES else 0.075
    lines = _legend_lines(panel, series, wide)
    axes = figure.add_axes((left + inset, bottom + (1.1 + 0.55 * lines) * line, wide - inset - 0.015,
                            high - (2.3 + 0.55 * lines) * line))  # fmt: skip
    _dress(axes)
    if panel.kind is Kind.HEATMAP:
        _heatmap(axes, series)
        return
    if panel.kind is Kind.STATES:
        _states(axes, series)
        return
    if not series:
        axes.set_axis_off()
        text = "not in this run: the engine's own metrics" if panel.exporter != "agent" else "no data"
        axes.text(0.5, 0.5, text, ha="center", va="center", size=9, color=MUTED)
        return
    _curves(axes, panel, series)
    if series:
        columns = max(1, math.ceil(len(_names(series)) / lines)) if lines else 1
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.9 * line / axes.get_position().height), ncol=columns,
            frameon=False, fontsize=8, handlelength=1.2, columnspacing=1.2, labelcolor=MUTED,
        )  # fmt: skip


def _names(series: Sequence[tuple[str, Any]]) -> list[str]:
    return [name for name, _ in series]


def _legend_lines(panel: Panel, series: Sequence[tuple[str, Any]], wide: float) -> int:
    """How many lines the legend needs under a panel of this width (a share of the figure)."""
    if panel.kind not in (Kind.LINES, Kind.STACKED):
        return 0
    letters = max((len(name) for name in _names(series)), default=1) + 5
    per_line = max(1, int(wide * 190 / letters))
    return math.ceil(len(series) / per_line)


def _dress(axes: Axes) -> None:
    axes.set_facecolor(CARD)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _curves(axes: Axes, panel: Panel, series: Sequence[tuple[str, Any]]) -> None:
    start = min((float(values[0][0]) for _, values in series), default=0.0)
    points = [
        (name, [float(t) - start for t, _ in values], [_number(v) for _, v in values])
        for name, values in series
    ]
    if panel.kind is Kind.STACKED and points:
        times = points[0][1]
        known = [dict(zip(xs, ys, strict=True)) for _, xs, ys in points]
        stacks = [[one.get(t, 0.0) for t in times] for one in known]
        colours = [FIXED.get(name, COLOURS[index]) for index, (name, _, _) in enumerate(points)]
        axes.stackplot(times, stacks, labels=[name for name, _, _ in points], colors=colours, linewidth=0)
    else:
        bases = list(dict.fromkeys(name.removesuffix(" wants") for name, _, _ in points))
        for name, xs, ys in points:
            base = name.removesuffix(" wants")
            colour, wants = COLOURS[bases.index(base) % len(COLOURS)], base != name
            axes.plot(
                xs, ys, "--" if wants else "-", color=colour, linewidth=0.9 if wants else 1.5, label=name
            )
    if panel.threshold is not None:
        axes.axhline(panel.threshold, color=BAD, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    if axes.get_ylim()[1] < 1e-9 or all(y == 0 for _, _, ys in points for y in ys if not math.isnan(y)):
        axes.set_ylim(0, 1)
    axes.margins(x=0)
    _ticks(axes, panel.unit)


def _ticks(axes: Axes, unit: Unit) -> None:
    top = axes.get_ylim()[1]
    if unit is Unit.BYTES and top > 0:
        axes.yaxis.set_major_locator(pyplot.MultipleLocator(2.0 ** math.ceil(math.log2(top / 5))))
    else:
        axes.yaxis.set_major_locator(pyplot.MaxNLocator(5))
    axes.yaxis.set_major_formatter(pyplot.FuncFormatter(lambda value, _: text_of(value, unit)))
    axes.xaxis.set_major_locator(pyplot.MultipleLocator(10))
    axes.xaxis.set_major_formatter(pyplot.FuncFormatter(_seconds))


def _seconds(value: float, _position: int) -> str:
    """No label at the origin, where the other axis has one."""
    return f"{value:.0f} s" if value else ""


def _states(axes: Axes, series: Sequence[tuple[str, Any]]) -> None:
    start = min((float(values[0][0]) for _, values in series), default=0.0)
    for index, (_, values) in enumerate(series):
        colour = COLOURS[1 if index == 0 else 0]
        for t, value in values:
            if float(value) > 0:
                axes.broken_barh([(float(t) - start, 1.0)], (index - 0.36, 0.72), facecolors=colour)
    axes.set_yticks(range(len(series)), [name for name, _ in series])
    axes.set_ylim(len(series) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.margins(x=0)
    axes.xaxis.set_major_formatter(pyplot.FuncFormatter(lambda value, _: f"{value:.0f} s"))


def _heatmap(axes: Axes, series: Sequence[tuple[str, Any]]) -> None:
    """Cumulative buckets over time: the difference of neighbours is what lies between two bounds."""
    ordered = sorted(series, key=lambda one: float(one[0].replace("+Inf", "inf")))
    times = sorted({float(t) for _, values in ordered for t, _ in values})
    cells: list[list[float]] = []
    below = [0.0] * len(times)
    for _, values in ordered:
        at = {float(t): _number(v) for t, v in values}
        level = [at.get(t, 0.0) for t in times]
        cells.append([max(0.0, now - before) for now, before in zip(level, below, strict=True)])
        below = level
    axes.grid(visible=False)
    axes.imshow(
        cells, aspect="auto", origin="lower", cmap="Blues", extent=(0, len(times), 0, len(cells)),
        interpolation="nearest",
    )  # fmt: skip
    bounds = [name for name, _ in ordered]
    shown = list(range(0, len(bounds), 2))
    labels = [text_of(float(bounds[i]), Unit.SECONDS) if bounds[i] != "+Inf" else "more" for i in shown]
    axes.set_yticks([i + 1 for i in shown], labels)
    axes.xaxis.set_major_formatter(pyplot.FuncFormatter(lambda value, _: f"{value:.0f} s"))


def _stat(
    figure: Figure, panel: Panel, series: Sequence[tuple[str, Any]], box: tuple[float, float, float, float]
) -> None:
    left, bottom, wide, high = box
    value = _number(series[0][1][-1][1]) if series else math.nan
    bad = panel.threshold is not None and value > panel.threshold
    colour = BAD if bad else GOOD if panel.threshold is not None else INK
    figure.text(
        left + wide / 2, bottom + high * 0.40, text_of(value, panel.unit), size=22, weight="bold",
        color=colour, ha="center", va="center",
    )  # fmt: skip


def _table(
    figure: Figure,
    panel: Panel,
    series: Sequence[tuple[str, Any]],
    box: tuple[float, float, float, float],
    line: float,
) -> None:
    left, bottom, wide, high = box
    ordered = sorted(series, key=lambda one: -_number(one[1][-1][1]))
    for index, (name, values) in enumerate(ordered[:8]):
        y = bottom + high - (1.7 + 0.85 * index) * line
        value = _number(values[-1][1])
        bad = panel.threshold is not None and value > panel.threshold
        figure.text(left + 0.012, y, textwrap.shorten(name, 60), size=9, color=INK, va="center")
        figure.text(
            left + wide - 0.012, y, text_of(value, panel.unit), size=9, color=BAD if bad else INK, ha="right",
            va="center", weight="bold" if bad else "normal",
        )  # fmt: skip


def legend_of(template: str, metric: Mapping[str, str]) -> str:
    """Grafana's {{label}} filled in; without a template, the labels."""
    if not template:
        return ", ".join(f"{key}={value}" for key, value in sorted(metric.items()))
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: metric.get(match[1], ""), template)


def text_of(value: float, unit: Unit) -> str:
    if math.isnan(value):
        return "no data"
    if unit is Unit.SECONDS:
        return _scaled(value, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))
    if unit is Unit.BYTES:
        return _scaled(value, ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")))
    if unit is Unit.SHARE:
        return f"{100 * value:.4g} %"
    if unit is Unit.BOOL:
        return "yes" if value >= 1 else "no"
    suffix = {Unit.PER_SECOND: "/s", Unit.TOKENS: " tok/s"}.get(unit, "")
    return f"{value:.3g}{suffix}" if abs(value) < 1000 else f"{value:,.0f}{suffix}"


def _scaled(value: float, steps: Sequence[tuple[float, str]]) -> str:
    if value == 0:
        return "0"
    for scale, name in steps:
        if abs(value) >= scale:
            return f"{value / scale:.3g} {name}"
    scale, name = steps[-1]
    return f"{value / scale:.2g} {name}"


def _number(text: object) -> float:
    return float(str(text).replace("+Inf", "inf"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m valve_dashboards.draw", description=CAPTION)
    parser.add_argument(
        "results", type=Path, help="what the monitoring tests leave: out/dashboards/results.json"
    )
    parser.add_argument("folder", type=Path, help="where the PNG files go: docs/dashboards")
    arguments = parser.parse_args(argv)
    for path in draw_boards(json.loads(arguments.results.read_text()), arguments.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
