# SPDX-License-Identifier: Apache-2.0
"""Request traces: when a request arrives, how long its prompt and its answer are.

Pure apart from reading the file.  `load` knows three published formats by their shape
(Azure LLM inference 2023 csv, BurstGPT csv, Mooncake jsonl) and gives one list of
`Arrival`; `Scaling` says how such a list is brought down to what a small model on a few
CPU cores can serve.  Called by the demo's app and by its tests.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TextIO, TypeVar

from valve_cli.demo.errors import TraceError

Row = TypeVar("Row")


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the first request, prompt tokens, tokens to generate."""

    at_s: float
    context_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Scaling:
    """How a trace is changed before it is replayed; written into the report as it is.

    time: seconds replayed per second of trace (5 = five times slower).
    context, output: factors on the token counts, applied before the bounds.
    *_min, *_max: bounds of the scaled counts, in tokens.
    """

    time: float = 1.0
    context: float = 1.0
    output: float = 1.0
    context_min: int = 1
    context_max: int = 1 << 30
    output_min: int = 1
    output_max: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("time", "context", "output"):
            if not getattr(self, name) > 0:
                raise TraceError(f"{name} scale must be above 0, got {getattr(self, name)}")
        for name in ("context", "output"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if not 1 <= low <= high:
                raise TraceError(f"{name} bounds must satisfy 1 <= min <= max, got {low} and {high}")

    def apply(self, arrivals: Iterable[Arrival]) -> list[Arrival]:
        return [
            Arrival(
                at_s=a.at_s * self.time,
                context_tokens=_clip(a.context_tokens * self.context, self.context_min, self.context_max),
                output_tokens=_clip(a.output_tokens * self.output, self.output_min, self.output_max),
            )
            for a in arrivals
        ]

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def _clip(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


def stretch(arrivals: Sequence[Arrival], start_s: float, count: int) -> list[Arrival]:
    """The first `count` requests at or after `start_s`, with times from the first of them."""
    chosen = [a for a in arrivals if a.at_s >= start_s][:count]
    if len(chosen) < count:
        raise TraceError(
            f"the trace holds {len(chosen)} requests from {start_s:g} s on, {count} were asked for:"
            " ask for fewer requests or start earlier"
        )
    first = chosen[0].at_s
    return [Arrival(a.at_s - first, a.context_tokens, a.output_tokens) for a in chosen]


def load(path: Path) -> list[Arrival]:
    """Read a trace, in order of arrival, the first request at 0 s.

    Raises TraceError with the line of the first row that is not as the format says."""
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            arrivals = list(_rows(path, handle))
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path} is not a text file ({error.reason} at byte {error.start})") from error
    if not arrivals:
        raise TraceError(f"{path} holds no requests")
    for number, (before, after) in enumerate(pairwise(arrivals), start=2):
        if after.at_s < before.at_s:
            raise TraceError(f"{path}: request {number} arrives before request {number - 1}")
    first = arrivals[0].at_s
    return [Arrival(a.at_s - first, a.context_tokens, a.output_tokens) for a in arrivals]


def _rows(path: Path, handle: TextIO) -> Iterator[Arrival]:
    opening = handle.readline()
    handle.seek(0)
    if opening.lstrip().startswith("{"):
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield _checked(path, number, _mooncake, line)
        return
    reader = csv.DictReader(handle)
    fields = set(reader.fieldnames or ())
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= fields:
        parse = _azure
    elif {"Timestamp", "Request tokens", "Response tokens"} <= fields:
        parse = _burstgpt
    else:
        raise TraceError(
            f"{path} is no trace format known here: expected an Azure 2023 csv (TIMESTAMP, ContextTokens,"
            " GeneratedTokens), a BurstGPT csv (Timestamp, Request tokens, Response tokens) or a Mooncake"
            f" jsonl (timestamp, input_length, output_length); the first line is {opening.strip()[:80]!r}"
        )
    for number, row in enumerate(reader, start=2):
        arrival = _checked(path, number, parse, row)
        if arrival.output_tokens > 0:  # BurstGPT marks failed requests by 0 response tokens
            yield arrival


def _checked(path: Path, number: int, parse: Callable[[Row], Arrival], row: Row) -> Arrival:
    try:
        return parse(row)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def _azure(row: dict[str, str]) -> Arrival:
    whole, _, fraction = row["TIMESTAMP"].partition(".")  # 7 digits: more than datetime parses
    seconds = datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")
    return Arrival(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _burstgpt(row: dict[str, str]) -> Arrival:
    return Arrival(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))


def _mooncake(line: str) -> Arrival:
    row = json.loads(line)
    return Arrival(row["timestamp"] / 1000.0, int(row["input_length"]), int(row["output_length"]))
