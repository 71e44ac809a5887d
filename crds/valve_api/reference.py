# SPDX-License-Identifier: Apache-2.0
"""docs/policy.md: every field of a ColocationPolicy with unit, default, bounds and reason.

Rendered from the models, so it cannot say anything else than the code. Pure; called by
generate.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from valve_api.model import ApiModel, Between
from valve_api.policy import PolicySpec
from valve_api.quantity import DURATION_EXAMPLES, QUANTITY_EXAMPLES
from valve_api.schema import default_of, field_schema

_INTRO = f"""\
<!-- Generated from the models in crds/valve_api by `python -m valve_api.generate`; do not edit. -->
# ColocationPolicy

The one settings object of Valve: which nodes, and what may happen on them. In a cluster it is a
cluster-scoped resource (`kubectl get colo`); on one machine the agent reads the same object from a file:
`valve agent --policy FILE`. Start from [examples/policy.yaml](../examples/policy.yaml) for GPU nodes or
[examples/demo.yaml](../examples/demo.yaml) for a machine without a GPU. Only `metadata.name` must be given;
every other field has the default below. A file with a mistake is refused as a whole, with one line per
mistake: the field, what was given and what is allowed.

## Units

* bytes: {QUANTITY_EXAMPLES}. `Ki`, `Mi`, `Gi`, `Ti` are powers of 1024; `k`, `M`, `G`, `T` powers of 1000.
* time: {DURATION_EXAMPLES}. A number without a unit is refused.
* % of device: a whole percentage such as `50%`, taken of each device by itself, so that one policy fits
  nodes with different GPUs.

## Fields

A name without a dot below a heading is a field of that object; headings are paths.
"""


def policy_reference() -> str:
    """The whole page."""
    return "\n".join([_INTRO, *_sections("spec", PolicySpec)]).rstrip() + "\n"


def _sections(path: str, model: type[ApiModel]) -> Iterator[str]:
    """A heading and a table for the object's own fields, then the objects in it."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    nested = {name: inner for name, field in fields.items() if (inner := model_in(field)) is not None}
    yield f"### {path}\n\n{' '.join((model.__doc__ or '').split())}\n"
    own = {name: field for name, field in fields.items() if name not in nested}
    if own:
        yield "| field | unit | default | allowed | meaning | why |\n|---|---|---|---|---|---|"
        yield from (_row(name, field) for name, field in own.items())
        yield ""
    for rule in model.rules:
        yield f"`{rule.field}` {rule.message}.\n"
    for name, inner in nested.items():
        yield from _sections(f"{path}.{name}", inner)


def model_in(field: FieldInfo) -> type[ApiModel] | None:
    """The model of a field that holds one object, else None."""
    if get_origin(field.annotation) in (list, dict):
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, ApiModel):
            return candidate
    return None


def _row(name: str, field: FieldInfo) -> str:
    extra: dict[str, Any] = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = "required" if field.is_required() else _value(default_of(field))
    meaning = extra["what"] + (" *Reserved: nothing reads it yet.*" if extra["reserved"] else "")
    cells = (f"`{name}`", extra["unit"], default, _allowed(field), meaning, extra["why"])
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _value(value: Any) -> str:
    return "empty" if value in ({}, [], "") else f"`{value}`"


def _allowed(field: FieldInfo) -> str:
    """Bounds in a few words."""
    if isinstance(field.annotation, type) and issubclass(field.annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in field.annotation)
    for item in field.metadata:
        if isinstance(item, Between):
            return item.sentence.removeprefix("must be ")
    schema = field_schema(field)
    if "minimum" in schema:
        return f"from {schema['minimum']:g} to {schema['maximum']:g}"
    if "maxProperties" in schema:
        return f"at most {schema['maxProperties']} entries"
    return "0% to 100%, or bytes up to the device"
