# SPDX-License-Identifier: Apache-2.0
"""The base of every API model: how a field documents itself, and cross-field rules.

A field is declared with `setting(...)`, which demands unit, meaning and reason; the
CRD, docs/policy.md and the tests read them from there. A cross-field rule is written
once as a `Rule`: the predicate that Python checks and the CEL expression that the API
server checks stand side by side, with one message.

Used by policy.py and node.py only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, Strict, model_validator
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from valve_api.errors import UnitError
from valve_api.quantity import Duration, Quantity

REQUIRED: Any = object()
"""As `default` of a setting: the field must be given."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition between fields of one object.

    field: the field an error points at, as written in YAML, dots between levels.
    message: a sentence that says what is allowed.
    cel: the condition for the API server; `self` is the object.
    holds: the same condition on the validated model.
    """

    field: str
    message: str
    cel: str
    holds: Callable[[Any], bool]


class ApiModel(BaseModel):
    """camelCase outside, snake_case inside; immutable; an unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        broken = [(rule, self._at(rule.field)) for rule in self.rules if not rule.holds(self)]
        if broken:
            text = "; ".join(f"{rule.field} {rule.message}" for rule, _ in broken)
            raise PydanticCustomError("rules", "{text}", {"text": text, "broken": broken})
        return self

    def _at(self, path: str) -> object:
        """The value of a field given or defaulted, as YAML shows it."""
        value: Any = self.model_dump(mode="json", by_alias=True)
        for step in path.split("."):
            value = value[step]
        return value


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a Quantity or Duration (both ends allowed), and what a Quantity must be a multiple of.

    Goes into Annotated. JSON schema has no bounds for texts, so the generator writes them as CEL.
    """

    low: Quantity | Duration
    high: Quantity | Duration
    multiple: Quantity | None = None

    def check(self, value: Any) -> Any:
        """The value itself; raises UnitError where it is out of bounds."""
        if not self.low <= value <= self.high or (self.multiple and value % self.multiple):
            raise UnitError(self.sentence)
        return value

    @property
    def sentence(self) -> str:
        multiple = f" and a multiple of {self.multiple}" if self.multiple else ""
        return f"must be from {self.low} to {self.high}{multiple}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


def bytes_between(low: str, high: str, multiple: str | None = None) -> Between:
    """Bounds of a Quantity."""
    return Between(Quantity(low), Quantity(high), Quantity(multiple) if multiple else None)


def time_between(low: str, high: str) -> Between:
    """Bounds of a Duration."""
    return Between(Duration(low), Duration(high))


Count = Annotated[int, Strict()]
"""A whole number; "3" and 3.0 are refused, as the API server refuses them."""
Factor = Annotated[float, Strict()]
"""A number; "2" is refused."""


def setting(
    default: Any,
    *,
    what: str,
    unit: str = "",
    why: str = "",
    reserved: bool = False,
    list_key: str = "",
    **limits: Any,
) -> Any:
    """A documented field.

    default: the value, a model class for a nested object that may be left out, or REQUIRED.
    why: the reason of the default (of the bounds, where there is no default).
    unit: as the operator reads it: "bytes", "time", "count", "name", "" for objects and enums.
    reserved: nothing reads the field yet; the docs say so.
    list_key: of a list of objects, the field that tells them apart (server-side apply merges by it).
    limits: ge, le, min_length, max_length, pattern: as pydantic's Field takes them.
    """
    note = " Reserved: nothing reads it yet." if reserved else ""
    description = f"{what}{note} Why: {why}" if why else f"{what}{note}"
    extra: JsonDict = {"what": what, "unit": unit, "why": why, "reserved": reserved, "listKey": list_key}
    if isinstance(default, type):
        return Field(default_factory=default, description=description, json_schema_extra=extra, **limits)
    if default is REQUIRED:
        return Field(description=description, json_schema_extra=extra, **limits)
    return Field(default=default, description=description, json_schema_extra=extra, **limits)
