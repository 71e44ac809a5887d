# SPDX-License-Identifier: Apache-2.0
"""Quantities, durations and shares as exact integers that remember how to be written.

A `Quantity` is an int of bytes, a `Duration` an int of nanoseconds, a `Share` either
bytes or whole percents of a device. All three are immutable, read what Kubernetes
reads (never rounding: a value that is no whole number of bytes or nanoseconds is
refused) and are written back in one canonical form, so that
`parse(str(x)) == x` always holds. The models use them as pydantic types; pydantic is
imported only when a model is built, so `settings` may use them without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, Self

from valve_api.errors import UnitError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

QUANTITY_EXAMPLES: Final = "64Mi, 1536Mi, 24Gi, 80G or a plain number of bytes"
DURATION_EXAMPLES: Final = "500us, 10ms, 1s, 1m30s or 2h"
SHARE_EXAMPLES: Final = f"a quantity ({QUANTITY_EXAMPLES}) or a percentage of the device such as 50%"
MAX_INT: Final = (1 << 63) - 1
"""Largest value of any of the three: what a Kubernetes quantity and a Go duration hold."""
DEVICE_BYTES_MAX: Final = 16 << 40
"""Largest device, and so the largest share of one."""
TEXT_MAX: Final = 32
"""Longest text that is read at all; bounds the CEL cost and Fraction's arithmetic."""

_BINARY: Final = {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", 1)}
_DECIMAL: Final = {letter: 1000**power for power, letter in enumerate("kMGTPE", 1)}
_DURATIONS: Final = {
    "h": 3_600_000_000_000,
    "m": 60_000_000_000,
    "s": 1_000_000_000,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
QUANTITY_PATTERN: Final = r"^[0-9]+(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E|[eE][0-9]{1,2})?$"
DURATION_PATTERN: Final = r"^([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+$"
PERCENT_PATTERN: Final = r"(100|[1-9]?[0-9])%"
SHARE_PATTERN: Final = f"{QUANTITY_PATTERN}|^{PERCENT_PATTERN}$"

_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?:([eE])([0-9]{1,2})|([A-Za-z]+))?", re.ASCII)
_DURATION_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s|m|h)", re.ASCII)
_PERCENT: Final = re.compile(PERCENT_PATTERN, re.ASCII)


def parse_quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity. Raises UnitError with examples."""
    match = _QUANTITY.fullmatch(text) if len(text) <= TEXT_MAX else None
    if match is None:
        raise UnitError(f"not a quantity; write {QUANTITY_EXAMPLES}")
    number, exponent_mark, exponent, suffix = match.groups()
    if exponent_mark:
        scale = 10 ** int(exponent)
    elif suffix is None:
        scale = 1
    else:
        scale = _BINARY.get(suffix) or _DECIMAL.get(suffix) or 0
    if not scale:
        raise UnitError(f"{suffix} is not a unit of memory{_unit_hint(suffix)}; write {QUANTITY_EXAMPLES}")
    value = Fraction(number) * scale
    if "." in number:  # the API server's CEL cannot calculate with a binary fraction: refuse it everywhere
        instead = format_quantity(value.numerator) if value.denominator == 1 else QUANTITY_EXAMPLES
        raise UnitError(f"a quantity has no fraction; write {instead}")
    return _bounded(value.numerator, "bytes")


def parse_duration(text: str) -> int:
    """Nanoseconds of a Go duration without sign. Raises UnitError with examples."""
    if len(text) > TEXT_MAX:
        raise UnitError(f"not a duration; write {DURATION_EXAMPLES}")
    total = Fraction(0)
    end = 0
    while part := _DURATION_PART.match(text, end):
        total += Fraction(part[1]) * _DURATIONS[part[2]]
        end = part.end()
    if end == 0 or end != len(text):
        missing = "a duration needs a unit" if text.replace(".", "", 1).isdigit() else "not a duration"
        raise UnitError(f"{missing}; write {DURATION_EXAMPLES}")
    if total.denominator != 1:
        raise UnitError(f"finer than a nanosecond; write {DURATION_EXAMPLES}")
    return _bounded(total.numerator, "nanoseconds")


def format_quantity(value: int) -> str:
    """The shortest exact form; binary units win a tie (1024 is 1Ki, 1000 is 1k, 1536 MiB is 1536Mi)."""
    best = str(value)
    for suffix, scale in reversed([*_DECIMAL.items(), *_BINARY.items()]):
        if value and value % scale == 0:
            text = f"{value // scale}{suffix}"
            best = min(best, text, key=len)
    return best


def format_duration(value: int) -> str:
    """Hours, minutes and seconds joined (1m30s) where whole seconds; below that one finer unit (1500ms)."""
    if value == 0:
        return "0s"
    if value % _DURATIONS["s"]:
        suffix, scale = next((s, n) for s, n in _DURATIONS.items() if n < 10**9 and value % n == 0)
        return f"{value // scale}{suffix}"
    text = ""
    for suffix in ("h", "m", "s"):
        count, value = divmod(value, _DURATIONS[suffix])
        text += f"{count}{suffix}" if count else ""
    return text


def _bounded(value: int, unit: str) -> int:
    if value > MAX_INT:
        raise UnitError(f"too large: at most {MAX_INT} {unit}")
    return value


def _unit_hint(suffix: str) -> str:
    """Names the unit that was probably meant: `GB` is G, `MiB` is Mi, `m` is a thousandth."""
    if suffix == "m":
        return " (m is a thousandth; M is 10^6 bytes, Mi is 2^20)"
    known = {unit.lower(): unit for unit in (*_BINARY, *_DECIMAL)}
    meant = known.get(suffix.lower()) or known.get(suffix.lower().removesuffix("b"))
    return f" (did you mean {meant}?)" if meant else ""


def _refuse_type(value: object, examples: str) -> UnitError:
    kind = {bool: "true or false", float: "a fraction without a unit", type(None): "nothing"}.get(type(value))
    return UnitError(f"{kind or 'this'} is not allowed here; write {examples}")


def _schema(read: Callable[[object], Any]) -> CoreSchema:
    """Validation by `read`; JSON output as the canonical text."""
    from pydantic_core import core_schema

    return core_schema.no_info_plain_validator_function(
        read, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="json")
    )


class Quantity(int):
    """Bytes. `Quantity("1536Mi")`, `Quantity(4096)`; `str()` is the canonical form."""

    def __new__(cls, value: object) -> Self:
        if isinstance(value, str):
            return super().__new__(cls, parse_quantity(value))
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise UnitError(f"negative; write {QUANTITY_EXAMPLES}")
            return super().__new__(cls, _bounded(value, "bytes"))
        raise _refuse_type(value, QUANTITY_EXAMPLES)

    def __str__(self) -> str:
        return format_quantity(int(self))

    def __repr__(self) -> str:
        return f"Quantity({str(self)!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(cls)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN, "maxLength": TEXT_MAX}


class Duration(int):
    """Nanoseconds. `Duration("1m30s")`, `Duration(10**9)`; a policy must give the text, with its unit."""

    def __new__(cls, value: object) -> Self:
        if isinstance(value, str):
            return super().__new__(cls, parse_duration(value))
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise UnitError(f"negative; write {DURATION_EXAMPLES}")
            return super().__new__(cls, _bounded(value, "nanoseconds"))
        raise _refuse_type(value, DURATION_EXAMPLES)

    @classmethod
    def from_policy(cls, value: object) -> Self:
        """Like the constructor, but a bare number is refused: nobody knows its unit."""
        if isinstance(value, int) and not isinstance(value, (bool, cls)):
            raise UnitError(f"a duration needs a unit; write {DURATION_EXAMPLES}")
        return cls(value)

    def __str__(self) -> str:
        return format_duration(int(self))

    def __repr__(self) -> str:
        return f"Duration({str(self)!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(cls.from_policy)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "pattern": DURATION_PATTERN, "maxLength": TEXT_MAX}


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a device: bytes, or whole percents of it. Exactly one of the two is not None."""

    bytes: int | None
    percent: int | None

    @classmethod
    def parse(cls, value: object) -> Self:
        """`Share.parse("50%")`, `Share.parse("4Mi")`, `Share.parse(4096)`. Raises UnitError with examples."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.endswith("%"):
            if not _PERCENT.fullmatch(value):
                raise UnitError("not a percentage; write a whole number from 0% to 100%")
            return cls(None, int(value[:-1]))
        try:
            size = int(Quantity(value))
        except UnitError as error:
            raise UnitError(str(error).replace(QUANTITY_EXAMPLES, SHARE_EXAMPLES)) from None
        if size > DEVICE_BYTES_MAX:
            raise UnitError(f"larger than any device; at most {format_quantity(DEVICE_BYTES_MAX)}")
        return cls(size, None)

    def of(self, device_bytes: int) -> int:
        """Bytes on a device of that size; percents round down."""
        if self.percent is not None:
            return device_bytes * self.percent // 100
        assert self.bytes is not None
        return self.bytes

    def __str__(self) -> str:
        return f"{self.percent}%" if self.bytes is None else format_quantity(self.bytes)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(cls.parse)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"x-kubernetes-int-or-string": True, "pattern": SHARE_PATTERN, "maxLength": TEXT_MAX}
