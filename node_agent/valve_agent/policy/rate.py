# SPDX-License-Identifier: Apache-2.0
"""How often things happen, and a limit on how often they may: events per minute.

Why it exists: metrics and status show reclaims and preemptions per minute, and the guardrail
maxReclaimsPerMinute bounds reclaims whatever the reservation does.  Pure: no I/O, no clock
(``now`` in ns on any monotonic clock is an argument), no threads; one caller each.
A ``now`` older than one already seen is taken as that one.
"""

from __future__ import annotations

from collections import deque

MINUTE_NS = 60_000_000_000


class RateMeter:
    """Events in the last minute (exact, up to one bucket) and in total.

    Events are counted in buckets of a 60th of the window, so memory is bounded however
    many there are; an event leaves the window between 1 and 61/60 windows after it came.
    """

    def __init__(self, window_ns: int = MINUTE_NS) -> None:
        if window_ns < 60:
            raise ValueError(f"window_ns is {window_ns}; give at least 60")
        self._window_ns = window_ns
        self._bucket_ns = window_ns // 60
        self._buckets: deque[tuple[int, int]] = deque()  # (start, events), ascending
        self._recent = 0
        self._total = 0
        self._now_ns: int | None = None

    @property
    def total(self) -> int:
        """Events ever."""
        return self._total

    def add(self, now: int, events: int = 1) -> None:
        """Count events that happened now.  Raises ValueError if events is negative."""
        if events < 0:
            raise ValueError(f"{events} events cannot happen; give at least 0")
        self._expire(now)
        assert self._now_ns is not None
        start = self._now_ns - self._now_ns % self._bucket_ns
        if self._buckets and self._buckets[-1][0] == start:
            self._buckets[-1] = (start, self._buckets[-1][1] + events)
        else:
            self._buckets.append((start, events))
        self._recent += events
        self._total += events

    def recent(self, now: int) -> int:
        """Events in the window that ends now."""
        self._expire(now)
        return self._recent

    def per_minute(self, now: int) -> float:
        """Events per minute over the window that ends now."""
        return self.recent(now) * MINUTE_NS / self._window_ns

    def _expire(self, now: int) -> None:
        self._now_ns = now if self._now_ns is None else max(self._now_ns, now)
        while self._buckets and self._buckets[0][0] + self._bucket_ns + self._window_ns <= self._now_ns:
            self._recent -= self._buckets.popleft()[1]


class RateLimit:
    """A token bucket: at most ``burst`` at once and ``per_minute`` in the long run.

    In any span of t minutes at most burst + per_minute x t are allowed, exactly: credit is
    kept in integers (one permission = MINUTE_NS units; a nanosecond earns per_minute units).

    Raises ValueError if per_minute < 0 or burst < 1.
    """

    def __init__(self, per_minute: int, burst: int, now_ns: int) -> None:
        if per_minute < 0:
            raise ValueError(f"per_minute is {per_minute}; give at least 0")
        if burst < 1:
            raise ValueError(f"burst is {burst}; give at least 1")
        self._per_minute = per_minute
        self._full = burst * MINUTE_NS
        self._credit = self._full
        self._now_ns = now_ns

    def allow(self, now: int) -> bool:
        """Whether one more may happen now; if so it is counted."""
        self._earn(now)
        if self._credit < MINUTE_NS:
            return False
        self._credit -= MINUTE_NS
        return True

    def deadline_ns(self) -> int | None:
        """When ``allow`` will next say yes: the last ``now`` if it would already; None for never."""
        missing = MINUTE_NS - self._credit
        if missing <= 0:
            return self._now_ns
        return None if self._per_minute == 0 else self._now_ns + -(-missing // self._per_minute)

    def _earn(self, now: int) -> None:
        if now > self._now_ns:
            self._credit = min(self._full, self._credit + (now - self._now_ns) * self._per_minute)
            self._now_ns = now
