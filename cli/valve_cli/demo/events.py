# SPDX-License-Identifier: Apache-2.0
"""Reads the agent's event log: what Valve did during the demo.

The log's fields are listed in docs/architecture.md.  Pure apart from the file; called by
the Valve phase (live, for the display) and by `measure.py` and `page.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from valve_cli.demo.errors import MeasurementError
from valve_cli.demo.stats import Span

SCHEMA = "valve.io/events/v1"


@dataclass(frozen=True)
class Reclaim:
    """One reclaim operation.  Sizes in bytes, time in microseconds."""

    t_ns: int
    slabs: int
    bytes: int
    bytes_in_use: int
    requests_harmed: int
    duration_us: float


@dataclass(frozen=True)
class PoolState:
    """Who holds how many slabs from t_ns on."""

    t_ns: int
    free: int
    reservation: int
    held: dict[str, int]


@dataclass
class Timeline:
    """The events that the report needs, in order of time."""

    pauses: list[tuple[int, float | None]] = field(default_factory=list)
    """(t_ns, latency_us) of every offline running→paused transition; None: no engine caused it."""
    resumes: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    reclaims: list[Reclaim] = field(default_factory=list)
    pool: list[PoolState] = field(default_factory=list)

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event; kinds that the report does not need are left out."""
        try:
            t_ns = int(event["t_ns"])
            match event["event"]:
                case "pause":
                    latency = event["latency_us"]
                    self.pauses.append((t_ns, None if latency is None else float(latency)))
                case "resume":
                    self.resumes.append(t_ns)
                case "busy":
                    self.busy.append(t_ns)
                case "idle":
                    self.idle.append(t_ns)
                case "reclaim":
                    self.reclaims.append(
                        Reclaim(
                            t_ns,
                            count_of(event["slabs"]),
                            int(event["bytes"]),
                            int(event["bytes_in_use"]),
                            count_of(event["requests_harmed"]),
                            float(event["duration_us"]),
                        )
                    )
                case "pool":
                    held = {str(k): int(v) for k, v in event["held"].items()}
                    self.pool.append(PoolState(t_ns, int(event["free"]), int(event["reservation"]), held))
        except KeyError as error:
            raise MeasurementError(
                f"the agent's event {event.get('event')!r} has no field {error}: agent and demo do not match"
            ) from error

    @property
    def paused(self) -> bool:
        return bool(self.pauses) and (not self.resumes or self.resumes[-1] < self.pauses[-1][0])

    def paused_spans(self, end_ns: int) -> list[Span]:
        """[pause, next resume]; a pause without a resume lasts until end_ns."""
        return spans_of([t for t, _ in self.pauses], self.resumes, end_ns)

    def busy_spans(self, end_ns: int) -> list[Span]:
        return spans_of(self.busy, self.idle, end_ns)


def count_of(value: object) -> int:
    """A count, given as a number or as the list of what is counted."""
    return len(value) if isinstance(value, list) else int(value)  # type: ignore[call-overload]


def spans_of(begins: Iterable[int], ends: Iterable[int], last_ns: int) -> list[Span]:
    """Spans from alternating begins and ends; a begin within an open span is part of it."""
    marks = sorted([(t, 0) for t in begins] + [(t, 1) for t in ends])
    spans: list[Span] = []
    since: int | None = None
    for t, kind in marks:
        if kind == 0:
            since = t if since is None else since
        elif since is not None:
            spans.append((since, t))
            since = None
    if since is not None and last_ns > since:
        spans.append((since, last_ns))
    return spans


def parse(line: bytes) -> dict[str, Any]:
    """One line of the log.  Raises MeasurementError if it is not of the schema we know."""
    try:
        event = json.loads(line)
    except ValueError as error:
        raise MeasurementError(
            f"the agent's event log holds a line that is no JSON: {line[:80]!r}"
        ) from error
    if event.get("schema") != SCHEMA:
        raise MeasurementError(
            f"the agent's event log is {event.get('schema')!r}, this demo reads {SCHEMA!r}"
        )
    return dict(event)
