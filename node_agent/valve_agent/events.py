# SPDX-License-Identifier: Apache-2.0
"""The event log: what the agent did, one JSON object per line, for people, benches and the demo.

Why it exists: an operator asks "why was my job stopped at 14:02", a bench asks "how many slabs in use
were taken"; both answers must come from what happened, not from counters guessed later.

Every event has `schema`, `t_ns` (CLOCK_MONOTONIC), `event` (its name) and the fields that
docs/architecture.md lists. The same lines go to stderr as the structured log, each with `level`.

Threading model: `emit` may be called from any thread and never blocks on a disk or a full pipe: it queues, a
daemon thread turns records into text and writes them. That thread lets a batch collect before it takes the
interpreter lock, so that it does not compete with what is going on when events come thick, as in a reclaim.
When it cannot keep up, events are dropped and counted, and the count is itself written. Callers: agent.py,
pool.py, main.py.
"""

from __future__ import annotations

import collections
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

SCHEMA = "valve.io/events/v1"
PENDING_MAX = 20_000
"""Events that may wait for the writer; about 10 MB. More than that are dropped and counted."""
BATCH_S = 0.02
"""How long the writer lets events collect."""

Record = dict[str, object]
Listener = Callable[[str, Mapping[str, object]], None]


class EventLog:
    """Writes events to a file (all of them) and to the log stream (those above `debug`)."""

    def __init__(self, path: Path | None = None, stream: TextIO | None = None) -> None:
        """Raises OSError if the file cannot be opened for appending."""
        self._file = path.open("a", encoding="utf-8") if path else None
        self._stream = stream
        self._pending: collections.deque[Record] = collections.deque()
        self._wake = threading.Condition()
        self._waiting = False
        self._listeners: list[Listener] = []
        self._dropped = 0
        self._closing = False
        self._thread = threading.Thread(target=self._write_loop, name="valve-events", daemon=True)
        self._thread.start()

    def listen(self, listener: Listener) -> None:
        """Call it with every event above `debug`, in the thread that emits: it must not wait."""
        self._listeners.append(listener)

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None:
        """Queue one event, of now unless `t_ns` is a field. `level` debug keeps it out of the log."""
        if level != "debug":
            for listener in self._listeners:
                listener(event, fields)
        record = _record(event, level, fields)
        with self._wake:
            if len(self._pending) >= PENDING_MAX:
                self._dropped += 1
                return
            self._pending.append(record)
            if self._waiting:
                self._waiting = False
                self._wake.notify()

    def close(self) -> None:
        """Write what is queued (bounded: a stuck pipe costs at most a second) and stop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=1.0)
        if self._file and not self._thread.is_alive():
            self._file.close()

    def _write_loop(self) -> None:
        while True:
            with self._wake:
                while not self._pending and not self._closing:
                    self._waiting = True
                    self._wake.wait()
                closing = self._closing
            if not closing:
                time.sleep(BATCH_S)
            with self._wake:
                records = list(self._pending)
                self._pending.clear()
                dropped, self._dropped = self._dropped, 0
                if closing and not records and not dropped:
                    return
            if dropped:
                records.append(_record("events-dropped", "warning", {"lines": dropped}))
            self._write(records)

    def _write(self, records: list[Record]) -> None:
        if self._file:
            try:
                self._file.write("".join(map(_line, records)))
                self._file.flush()
            except OSError as error:  # a full disk must not stop the agent: say so, go on without the file
                self._file = None
                records.append(_record("events-file-lost", "error", {"error": str(error)}))
        if self._stream:
            try:
                self._stream.write("".join(_line(record) for record in records if record["level"] != "debug"))
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads our stderr any more; the file stays
                self._stream = None


class Labelled:
    """The same log for one of several devices: every event carries the labels."""

    def __init__(self, log: EventLog, **labels: object) -> None:
        self._log = log
        self._labels = labels

    def listen(self, listener: Listener) -> None:
        self._log.listen(listener)

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None:
        self._log.emit(event, level=level, **{**self._labels, **fields})


def _record(event: str, level: str, fields: Record) -> Record:
    return {"schema": SCHEMA, "t_ns": time.monotonic_ns(), "event": event, "level": level, **fields}


def _line(record: Record) -> str:
    return json.dumps(record, separators=(",", ":"), default=str) + "\n"
