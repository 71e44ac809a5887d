# SPDX-License-Identifier: Apache-2.0
"""What is going on right now: written by the phases, read by the display.

A plain mutable record in one asyncio loop; no I/O.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from valve_cli.demo.loadgen import Request

RATE_WINDOW_NS = 5_000_000_000


@dataclass
class Progress:
    """The demo's state for people."""

    steps: tuple[str, ...] = ()
    step: str = "starting"
    detail: str = ""
    step_begin_s: float = field(default_factory=time.monotonic)
    expected_s: float | None = None
    requests: list[Request] = field(default_factory=list)
    online: bool = False
    """Whether this step has online requests."""
    offline_samples: list[tuple[int, int]] = field(default_factory=list)
    offline_running: int = 0
    offline_finished: int = 0
    gate: str = ""
    preemptions: int = 0
    reclaims: int = 0
    slabs: dict[str, int] = field(default_factory=dict)
    slabs_total: int = 0
    reserved: int = 0
    notes: deque[str] = field(default_factory=deque)

    def begin(
        self, step: str, detail: str = "", expected_s: float | None = None, online: bool = False
    ) -> None:
        self.step, self.detail, self.expected_s, self.online = step, detail, expected_s, online
        self.step_begin_s = time.monotonic()
        self.requests = []
        self.offline_samples = []
        self.gate = ""

    def note(self, text: str) -> None:
        """One line for the log of the display."""
        self.notes.append(text)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.step_begin_s

    @property
    def left_s(self) -> float | None:
        return None if self.expected_s is None else max(0.0, self.expected_s - self.elapsed_s)

    def online_so_far(self) -> tuple[int, int, float | None, float | None]:
        """(done, in all, TTFT mean ms, TPOT mean ms) of the running replay."""
        ended = [r for r in self.requests if r.done]
        ttft = [v for r in ended if (v := r.ttft_ms) is not None]
        tpot = [v for r in ended if (v := r.tpot_ms) is not None]
        return (
            len(ended),
            len(self.requests),
            sum(ttft) / len(ttft) if ttft else None,
            sum(tpot) / len(tpot) if tpot else None,
        )

    def offline_rate(self) -> float | None:
        """Offline tokens/s over the last seconds."""
        if not self.offline_samples:
            return None
        now = time.monotonic_ns()
        recent = [s for s in self.offline_samples[-400:] if s[0] > now - RATE_WINDOW_NS]
        if len(recent) < 2:
            return 0.0
        return (recent[-1][1] - recent[0][1]) / (RATE_WINDOW_NS / 1e9)
