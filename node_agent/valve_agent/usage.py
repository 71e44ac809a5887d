# SPDX-License-Identifier: Apache-2.0
"""How long online was busy and offline was paused, counted from the gate's events.

Why it exists: both change within milliseconds and a scrape comes every few seconds, so a gauge shows chance.
Seconds that add up show the share of time exactly, whatever the scrape interval.

Threading model: the server thread only. Callers: agent.py (events), status.py (totals).
"""

from __future__ import annotations

from collections.abc import Mapping


class Usage:
    def __init__(self, now_ns: int) -> None:
        """Offline counts as paused at the start, as the gate begins."""
        self._busy: dict[object, int] = {}
        """Busy engine's connection -> since when."""
        self._any_busy = _Span()
        self._paused = _Span(now_ns)

    def on_event(self, event: Mapping[str, object]) -> None:
        """One of the gate's events, in order. `idle` also comes when a busy engine dies."""
        name, t_ns, conn = event["event"], event["t_ns"], event.get("conn")
        assert isinstance(t_ns, int)
        if name == "busy":
            self._busy.setdefault(conn, t_ns)
            self._any_busy.begin(t_ns)
        elif name == "idle":
            self.engine_gone(conn, t_ns)
        elif name == "pause":
            self._paused.begin(t_ns)
        elif name == "resume":
            self._paused.end(t_ns)

    def engine_gone(self, conn: object, t_ns: int) -> None:
        self._busy.pop(conn, None)
        if not self._busy:
            self._any_busy.end(t_ns)

    def totals_s(self, now_ns: int) -> dict[str, float]:
        """Seconds since the agent's start, the open spans included."""
        return {
            "online_busy": round(self._any_busy.total_ns(now_ns) / 1e9, 6),
            "offline_paused": round(self._paused.total_ns(now_ns) / 1e9, 6),
        }


class _Span:
    """Time in which something holds. Begun twice counts once."""

    def __init__(self, since_ns: int | None = None) -> None:
        self._since_ns = since_ns
        self._ended_ns = 0

    def begin(self, at_ns: int) -> None:
        if self._since_ns is None:
            self._since_ns = at_ns

    def end(self, at_ns: int) -> None:
        if self._since_ns is not None:
            self._ended_ns += max(0, at_ns - self._since_ns)
            self._since_ns = None

    def total_ns(self, now_ns: int) -> int:
        running = max(0, now_ns - self._since_ns) if self._since_ns is not None else 0
        return self._ended_ns + running
