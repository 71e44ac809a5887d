# SPDX-License-Identifier: Apache-2.0
"""What main needs of the gate, and holds that do not make main wait.

Why it exists: a hold takes as long as the gate needs to pause everybody, which may be long, and the server
thread serves everybody else meanwhile.

Threading model: `HoldWorker` has a thread of its own; `ask`, `answer` and `take` belong to the server thread.
Callers: agent.py.
"""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from valve_agent.gate_link import GateError
from valve_agent.pool import HOLD_TIMEOUT_NS


class Gate(Protocol):
    """What main needs of gate_link.GateHandle."""

    doorbell_fd: int

    @property
    def pid(self) -> int: ...

    def add_engine(self, conn: int, pid: int, page_fd: int) -> None: ...
    def add_target(self, conn: int, pid: int, pidfd: int, page_fd: int, barrier: bool) -> None: ...
    def supply(self, conn: int, number: int, fds: Sequence[int]) -> None: ...
    def withdraw(self, conn: int, number: int) -> None: ...
    def remove(self, conn: int) -> None: ...
    def set_scanned(self, pids: dict[int, int]) -> None: ...
    def hold(self, timeout_s: float) -> object: ...
    def release(self) -> None: ...
    def fileno(self) -> int: ...
    def read_events(self) -> list[dict[str, Any]]: ...


class HoldWorker:
    """Asks the gate to hold in a thread of its own; answers come through `take` after a wake."""

    def __init__(self, gate: Gate, wake: Callable[[], None]) -> None:
        self._gate = gate
        self._wake = wake
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: collections.deque[tuple[str, bool, str]] = collections.deque()
        self._thread = threading.Thread(target=self._loop, name="valve-hold", daemon=True)
        self._thread.start()

    def ask(self, who: str) -> None:
        """`who` comes back with the answer; not empty."""
        self._asked.put(who)

    def take(self) -> tuple[str, bool, str] | None:
        """(who asked, held, why not) of the next answered hold; None if there is none."""
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        self._asked.put("")
        self._thread.join(timeout=HOLD_TIMEOUT_NS / 1e9 + 1)

    def answer(self, who: str, held: bool, why: str) -> None:
        """Leave an answer for `take`."""
        self._answers.append((who, held, why))
        self._wake()

    def _loop(self) -> None:
        while who := self._asked.get():
            try:
                self._gate.hold(HOLD_TIMEOUT_NS / 1e9)
            except GateError as error:  # a dead gate is also seen, and acted on, by the server thread
                self.answer(who, False, str(error))
            else:
                self.answer(who, True, "")
