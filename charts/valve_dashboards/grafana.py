# SPDX-License-Identifier: Apache-2.0
"""Boards as Grafana's dashboard JSON, by Grafana's own typed builders.

Threading model: pure. Caller: __main__.py, tests/unit/monitoring (drift).
"""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from valve_dashboards.panels import Board, Kind, Panel, Place, Row, Unit, Variable, layout

DATASOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
REFRESH = "30s"
_UNITS = {Unit.TOKENS: "suffix: tokens/s", Unit.BOOL: "bool_yes_no"}
_Builder = (
    stat.Panel | timeseries.Panel | statetimeline.Panel | heatmap.Panel | table.Panel
)  # what one panel is built with


def to_json(board: Board) -> str:
    """The JSON of one dashboard, as it is committed."""
    made = (
        builder.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["valve"])
        .readonly()
        .refresh(REFRESH)
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(builder.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for variable in board.variables:
        made = made.with_variable(_variable(variable))
    for number, (item, place) in enumerate(layout(board), start=1):
        if isinstance(item, Row):
            made = made.with_row(_row(item, place).id(number))
        else:
            made = made.with_panel(_panel(item, place).id(number))
    document = _without_nulls(json.loads(JSONEncoder(sort_keys=True).encode(made.build())))
    return json.dumps(document, indent=2) + "\n"


def _without_nulls(value: Any) -> Any:
    """A field that says nothing is left out: Grafana's defaults are for what is missing, not for null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _variable(variable: Variable) -> builder.QueryVariable:
    return (
        builder.QueryVariable(variable.name)
        .label(variable.label)
        .query(variable.query)
        .datasource(DATASOURCE)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .multi(True)
        .all_value(".*")
    )


def _row(row: Row, place: Place) -> builder.Row:
    return builder.Row(row.title).grid_pos(_grid(place))


def _grid(place: Place) -> dashboard.GridPos:
    return dashboard.GridPos(h=place.height, w=place.width, x=place.x, y=place.y)


def _panel(panel: Panel, place: Place) -> _Builder:
    made = _bare(panel)
    made = (
        made.title(panel.title)
        .description(panel.description)
        .datasource(DATASOURCE)
        .grid_pos(_grid(place))
    )  # fmt: skip
    if panel.kind is not Kind.HEATMAP:
        made = made.unit(_UNITS.get(panel.unit, panel.unit.value))
    if panel.threshold is not None:
        made = made.thresholds(
            builder.ThresholdsConfig()
            .mode(dashboard.ThresholdsMode.ABSOLUTE)
            .steps(
                [
                    dashboard.Threshold(value=None, color="green"),
                    dashboard.Threshold(value=panel.threshold, color="red"),
                ]
            )
        )
    for index, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id(chr(ord("A") + index))
        if query.legend:
            target = target.legend_format(query.legend)
        if panel.kind in (Kind.STAT, Kind.TABLE):
            target = target.instant()
        if panel.kind is Kind.TABLE:
            target = target.format(PromQueryFormat.TABLE)
        if panel.kind is Kind.HEATMAP:
            target = target.format(PromQueryFormat.HEATMAP)
        made = made.with_target(target)
    return made


def _bare(panel: Panel) -> _Builder:
    if panel.kind is Kind.STAT:
        return stat.Panel()
    if panel.kind is Kind.STATES:
        return statetimeline.Panel()
    if panel.kind is Kind.HEATMAP:
        return heatmap.Panel().calculate(False)
    if panel.kind is Kind.TABLE:
        return table.Panel()
    lines = timeseries.Panel().line_width(1).min(0)
    if panel.kind is Kind.STACKED:
        stacking = common_builder.StackingConfig().mode(common.StackingMode.NORMAL)
        return lines.fill_opacity(60).stacking(stacking)
    if panel.threshold is not None:
        style = common_builder.GraphThresholdsStyleConfig().mode(common.GraphTresholdsStyleMode.LINE)
        return lines.thresholds_style(style)
    return lines
