# SPDX-License-Identifier: Apache-2.0
"""The event log: what the agent did, one JSON object per line, for people, benches and the demo.

Why it exists: an operator asks "why was my job stopped at 14:02", a bench asks "how many slabs in use
were taken"; both answers must come from what happened, not from counters guessed later.

Every event has `schema`, `t_ns` (CLOCK_MONOTONIC), `event` (its name) and the fields that
docs/architecture.md lists. The same lines go to stderr as the structured log, each with `level`.

Threading model: `emit` may be called from any thread and never blocks on a disk or a full pipe: a
daemon thread writes. When it cannot keep up, lines are dropped and counted, and the count is itself
written. Callers: server.py, pool.py, main.py.
"""

from __future__ import annotations

import collections
import json
import threading
import time
from pathlib import Path
from typing import TextIO

SCHEMA = "valve.io/events/v1"
PENDING_MAX = 20_000
"""Lines that may wait for the writer; about 5 MB. More than that are dropped and counted."""


class EventLog:
    """Writes events to a file (all of them) and to the log stream (those above `debug`)."""

    def __init__(self, path: Path | None = None, stream: TextIO | None = None) -> None:
        """Raises OSError if the file cannot be opened for appending."""
        self._file = path.open("a", encoding="utf-8") if path else None
        self._stream = stream
        self._pending: collections.deque[tuple[str, bool]] = collections.deque()
        self._wake = threading.Condition()
        self._dropped = 0
        self._closing = False
        self._thread = threading.Thread(target=self._write_loop, name="valve-events", daemon=True)
        self._thread.start()

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None:
        """Queue one event, of now unless `t_ns` is a field. `level` debug keeps it out of the log."""
        line = _line(event, level, fields)
        with self._wake:
            if len(self._pending) >= PENDING_MAX:
                self._dropped += 1
                return
            self._pending.append((line, level != "debug"))
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
                    self._wake.wait()
                if not self._pending:
                    return
                lines = list(self._pending)
                self._pending.clear()
                dropped, self._dropped = self._dropped, 0
            if dropped:
                lines.append((_line("events-dropped", "warning", {"lines": dropped}), True))
            self._write(lines)

    def _write(self, lines: list[tuple[str, bool]]) -> None:
        if self._file:
            try:
                self._file.write("".join(line + "\n" for line, _ in lines))
                self._file.flush()
            except OSError as error:  # a full disk must not stop the agent: say so, go on without the file
                self._file = None
                lines = [*lines, (_line("events-file-lost", "error", {"error": str(error)}), True)]
        if self._stream:
            try:
                self._stream.write("".join(line + "\n" for line, loud in lines if loud))
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads our stderr any more; the file stays
                self._stream = None


def _line(event: str, level: str, fields: dict[str, object]) -> str:
    record = {"schema": SCHEMA, "t_ns": time.monotonic_ns(), "event": event, "level": level, **fields}
    return json.dumps(record, separators=(",", ":"), default=str)
