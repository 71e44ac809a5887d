# SPDX-License-Identifier: Apache-2.0
"""From a model to the structural schema that the API server wants.

A structural schema has no $ref, gives every node a type and says beside it what JSON
schema cannot: CEL rules, list keys. Pure; called by generate.py.
"""

from __future__ import annotations

from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from valve_api.model import ApiModel, Between, Rule
from valve_api.quantity import DEVICE_BYTES_MAX, Duration, Quantity, Share, format_quantity

Schema = dict[str, Any]

SERVER_OWNED = ("apiVersion", "kind", "metadata")
"""Fields whose schema is the API server's own."""


def root_schema(model: type[ApiModel]) -> Schema:
    """openAPIV3Schema of a custom resource."""
    schema = object_schema(model)
    schema["properties"] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        **{name: value for name, value in schema["properties"].items() if name not in SERVER_OWNED},
    }
    schema["required"] = [name for name in schema.get("required", []) if name not in SERVER_OWNED]
    if not schema["required"]:
        del schema["required"]
    return schema


def object_schema(model: type[ApiModel]) -> Schema:
    """Schema of an object: fields in the order they are declared, then the rules between them."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    schema: Schema = {
        "type": "object",
        "properties": {
            name: field_schema(field) for name, field in fields.items() if name not in SERVER_OWNED
        },
    }
    if model.__doc__:
        schema["description"] = " ".join(model.__doc__.split())
    required = [name for name, field in fields.items() if field.is_required()]
    if required:
        schema["required"] = required
    if model.rules:
        schema["x-kubernetes-validations"] = [validation(rule) for rule in model.rules]
    return schema


def validation(rule: Rule) -> Schema:
    """One entry of x-kubernetes-validations."""
    return {"rule": rule.cel, "message": f"{rule.field} {rule.message}", "fieldPath": f".{rule.field}"}


def field_schema(field: FieldInfo) -> Schema:
    """Schema of one field with its description, default and bounds."""
    schema = type_schema(field.annotation, tuple(field.metadata))
    if field.description:
        schema["description"] = field.description
    default = default_of(field)
    if default is not None:
        schema["default"] = default
    extra = field.json_schema_extra
    if isinstance(extra, dict) and extra.get("listKey"):
        schema["x-kubernetes-list-type"] = "map"
        schema["x-kubernetes-list-map-keys"] = [extra["listKey"]]
    return schema


def type_schema(annotation: Any, metadata: tuple[Any, ...] = ()) -> Schema:
    """Schema of an annotation; `metadata` is what Annotated and Field say of it."""
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        return type_schema(annotation, (*metadata, *more))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        inner = [argument for argument in arguments if argument is not NoneType]
        return type_schema(inner[0], metadata)
    if isinstance(annotation, type) and issubclass(annotation, ApiModel):
        return object_schema(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {"type": "string", "enum": [member.value for member in annotation]}
    if origin is list:
        items = _plain(annotation, metadata, "maxItems")
        return {"type": "array", "items": type_schema(arguments[0]), **items}
    if origin is dict:
        values = type_schema(arguments[1])
        limits = _plain(annotation, metadata, "maxProperties")
        return {"type": "object", "additionalProperties": values, **limits, **_key_rule(arguments[0])}
    schema = _leaf(annotation, metadata)
    if rules := _text_rules(annotation, metadata):
        schema["x-kubernetes-validations"] = rules
    return schema


def default_of(field: FieldInfo) -> Any:
    """The default as JSON; None where there is none.

    A nested object's default is written out whole: the API server checks an object's rules
    against its default before it fills in the defaults of the fields.
    """
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return None
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    if isinstance(value, (Quantity, Duration, Share)):
        return str(value)
    return to_jsonable_python(value)


def _annotated(annotation: Any, metadata: tuple[Any, ...]) -> Any:
    for item in metadata:
        annotation = Annotated[annotation, item]
    return annotation


def _leaf(annotation: Any, metadata: tuple[Any, ...]) -> Schema:
    """pydantic's schema of a scalar, without what a structural schema must not have."""
    bounds = tuple(item for item in metadata if not isinstance(item, Between))
    schema: Schema = TypeAdapter(_annotated(annotation, bounds)).json_schema()
    schema.pop("title", None)
    if schema.get("type") == "integer":
        schema["format"] = "int64"
    return {name: schema[name] for name in sorted(schema, key=lambda name: name != "type")}


def _plain(annotation: Any, metadata: tuple[Any, ...], *keep: str) -> Schema:
    schema: Schema = TypeAdapter(_annotated(annotation, metadata)).json_schema()
    return {name: schema[name] for name in keep if name in schema}


def _text_rules(annotation: Any, metadata: tuple[Any, ...]) -> list[Schema]:
    """CEL for the bounds of quantities and durations, which are texts to JSON schema."""
    rules = []
    if annotation is Share:
        size = "quantity(string(self))"
        high = format_quantity(DEVICE_BYTES_MAX)
        cel = (
            "string(self).endsWith('%') || "
            f"({size}.compareTo(quantity('0')) >= 0 && {size}.compareTo(quantity('{high}')) <= 0)"
        )
        rules.append({"rule": cel, "message": f"must be a percentage or from 0 to {high}"})
    for between in (item for item in metadata if isinstance(item, Between)):
        if isinstance(between.low, Duration):
            cel = (
                f"duration(self) >= duration('{between.low}') && duration(self) <= duration('{between.high}')"
            )
        else:
            value = "quantity(string(self))"
            cel = (
                f"{value}.compareTo(quantity('{between.low}')) >= 0 && "
                f"{value}.compareTo(quantity('{between.high}')) <= 0"
            )
            if between.multiple:
                cel += f" && {value}.asInteger() % {int(between.multiple)} == 0"
        rules.append({"rule": cel, "message": between.sentence})
    return rules


def _key_rule(annotation: Any) -> Schema:
    """Bounds of a map's keys, for which JSON schema has no word the API server takes."""
    limits = _leaf(annotation, ()) if annotation is not str else {}
    low, high = limits.get("minLength", 0), limits.get("maxLength")
    if high is None:
        return {}
    rule = f"self.all(key, size(key) >= {low} && size(key) <= {high})"
    return {"x-kubernetes-validations": [{"rule": rule, "message": f"names have {low} to {high} characters"}]}


__all__ = ["default_of", "field_schema", "object_schema", "root_schema", "type_schema"]
