# SPDX-License-Identifier: Apache-2.0
"""The event log: whole lines, in order, and never in anybody's way."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from valve_agent import events
from valve_agent.events import SCHEMA, EventLog


class BrokenStream(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("nobody reads")


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_have_schema_time_and_name_and_keep_their_order(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = EventLog(tmp_path / "events.jsonl", stream)
    log.emit("start", slabs=3)
    log.emit("busy", level="debug", t_ns=5)
    log.emit("odd", what={1, 2})
    log.close()
    first, second, third = read(tmp_path / "events.jsonl")
    assert (first["schema"], first["event"], first["slabs"]) == (SCHEMA, "start", 3)
    assert isinstance(first["t_ns"], int)
    assert (second["event"], second["t_ns"]) == ("busy", 5)
    assert third["event"] == "odd", "what JSON does not know is written as text"
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["start", "odd"]


def test_it_appends(tmp_path: Path) -> None:
    for name in ("first", "second"):
        log = EventLog(tmp_path / "events.jsonl")
        log.emit(name)
        log.close()
    assert [event["event"] for event in read(tmp_path / "events.jsonl")] == ["first", "second"]


def test_a_stream_that_nobody_reads_does_not_cost_the_file(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", BrokenStream())
    for number in range(3):
        log.emit(f"event{number}")
    log.close()
    assert len(read(tmp_path / "events.jsonl")) == 3


def test_a_full_queue_drops_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PENDING_MAX", 2)
    log = EventLog(tmp_path / "events.jsonl")
    with log._wake:  # the writer cannot get in, as if the disk hung
        for number in range(5):
            log.emit(f"event{number}")
    log.close()
    written = read(tmp_path / "events.jsonl")
    assert [event["event"] for event in written] == ["event0", "event1", "events-dropped"]
    assert written[-1]["lines"] == 3
