# SPDX-License-Identifier: Apache-2.0
"""Busy or idle: whether a request is in this process, told to the agent without a gap.

A request passes through threads (API event loop; engine core's input thread, then its main
thread). Between two of them it is in no queue that anyone could count, so the place where it
enters names it, and it counts as present until the next stage has it.

Thread-safe. Called by the engine plugins' hooks on the path of every request: one lock, held
for a handful of instructions and the callback that counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from valve_runtime.elastic import Link


class Activity:
    """Tells ``link`` busy at the first sign of a request and idle when ``settle`` finds none."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._entering: dict[str, int] = {}
        self.busy = False

    def enter(self, request: str) -> None:
        """A request is known; nothing has been done for it yet."""
        with self._lock:
            self._entering[request] = self._entering.get(request, 0) + 1
            self.busy = True
            self._link.busy()

    def entered(self, request: str) -> None:
        """The next stage has it (or refused it): ``settle``'s count speaks for it from now on.
        Harmless for a request that never entered here."""
        with self._lock:
            left = self._entering.get(request, 0) - 1
            if left > 0:
                self._entering[request] = left
            else:
                self._entering.pop(request, None)

    def settle(self, present: Callable[[], int], decode_gap_ns: int = 0) -> bool:
        """Tell idle if nothing is entering and ``present()`` counts no request. True if that was
        news. May be called as often as one likes, also when idle already."""
        if not self.busy:
            return False
        with self._lock:
            if self._entering or present():
                return False
            self.busy = False
            self._link.idle(decode_gap_ns)
            return True

    def gone(self) -> None:
        """The engine behind this process died: nothing more will happen to its requests."""
        with self._lock:
            self._entering.clear()
            self.busy = False
            self._link.idle(0)
