# SPDX-License-Identifier: Apache-2.0
"""The log: one JSON object per line on stderr, in the form of the agent's events (`valve.io/events/v1`).

Why it exists: what the plugin did with whose memory must be found by fields, not by reading prose.

Threading model: any thread; one line is one write under a lock. Callers: every module with effects.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TextIO

from valve_api.names import EVENT_SCHEMA

LEVELS = ("debug", "info", "warning", "error")


class Log:
    def __init__(self, stream: TextIO, level: str = "info") -> None:
        self._stream = stream
        self._least = LEVELS.index(level)
        self._lock = threading.Lock()
        self._last: dict[str, str] = {}

    def emit(self, event: str, *, level: str = "info", **fields: object) -> None:
        if LEVELS.index(level) < self._least:
            return
        record = {
            "schema": EVENT_SCHEMA, "t_ns": time.monotonic_ns(), "time_s": round(time.time(), 3),
            "component": "device-plugin", "level": level, "event": event, **fields,
        }  # fmt: skip
        line = json.dumps(record, default=str) + "\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()

    def changed(self, event: str, state: str, *, level: str = "info", **fields: object) -> None:
        """Emit only if `state` differs from the last one of this event: for what is looked at every second.
        An empty state is the good one, and says so once after a bad one."""
        with self._lock:
            before = self._last.get(event, "")
            self._last[event] = state
        if state != before:
            self.emit(event, level=level if state else "info", state=state or "ok", **fields)
