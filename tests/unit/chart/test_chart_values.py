# SPDX-License-Identifier: Apache-2.0
"""values.yaml and values.schema.json name the same values, and every one is explained. No helm needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[3] / "charts/valve"
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
OF_HELM = {"global"}
"""Helm puts it into every chart's values."""
OF_KUBERNETES = {"resources", "updateStrategy"}
"""Kubernetes' own objects: the default names some of their fields."""


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
        return found
    return schema


def closed(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object schema with properties, with its path."""
    schema = resolved(schema)
    if "properties" in schema:
        yield path, schema
        for name, inner in schema["properties"].items():
            yield from closed(inner, f"{path}.{name}")


def test_no_object_takes_names_that_it_does_not_list() -> None:
    objects = dict(closed(SCHEMA))
    assert len(objects) > 20
    for path, schema in objects.items():
        assert schema["additionalProperties"] is False, path


def test_values_and_schema_name_the_same() -> None:
    for path, schema in closed(SCHEMA):
        steps = [step for step in path.split(".") if step]
        if OF_KUBERNETES & set(steps):
            continue
        value: Any = VALUES
        for step in steps:
            value = value[step]
        assert set(schema["properties"]) - OF_HELM == set(value), path or "top level"


def test_every_group_of_values_is_explained() -> None:
    """A comment stands above every value at the top level, or within its group."""
    text = (CHART / "values.yaml").read_text()
    groups = text.split("\n\n")
    for name in VALUES:
        group = next(part for part in groups if f"\n{name}:" in f"\n{part}")
        assert "#" in group, name
