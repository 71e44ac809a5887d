# SPDX-License-Identifier: Apache-2.0
"""A tenant without an engine: holds slabs and does what it is told, one JSON object per line.

Why it exists: benches and tests need real tenant processes under a real libvalve whose memory they can fill,
own and look at. It runs under `valve run`, knows nothing of the agent, and imports only the runtime.

Threading model: one thread reads commands from standard input and answers on standard output; `spin` adds
threads that only burn CPU. Started by rig.LiveTenant.

A command is {"do": NAME, ...}; the answer {"ok": true, ...} or {"ok": false, "error": TEXT}.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
import time
from typing import Any

from valve_runtime import _lib

POLL_S = 20e-6


class Tenant:
    def __init__(self) -> None:
        self.valve = _lib.load()
        self.arena: _lib.Arena | None = None
        self.held: set[int] = set()
        self.lost: list[int] = []

    def do_state(self) -> dict[str, Any]:
        valve = self.valve
        return {
            "role": valve.role(), "connected": valve.connected(), "last_error": valve.last_error(),
            "present": valve.present,
        }  # fmt: skip

    def do_attach(self, timeout_ms: int) -> dict[str, Any]:
        return {"attached": self.valve.attach(timeout_ms), "last_error": self.valve.last_error()}

    def do_arena(self, slabs: int, slab_bytes: int, timeout_ms: int = 5000) -> dict[str, Any]:
        self.arena = self.valve.arena_open(slabs * slab_bytes, timeout_ms)
        return {"slabs": self.arena.slabs, "slab_bytes": self.arena.slab_bytes}

    def do_want(self, slabs: int, urgent: bool = False) -> dict[str, Any]:
        self.valve.want(slabs, urgent)
        return {}

    def do_poll(self) -> dict[str, Any]:
        events = self._drain()
        return {"events": events, "held": sorted(self.held), "lost": self.lost}

    def do_take(self, slabs: int, timeout_s: float = 5.0) -> dict[str, Any]:
        """Want `slabs` in all and wait for them; the times bracket what an engine would wait for."""
        wanted_ns = time.monotonic_ns()
        self.valve.want(slabs, True)
        deadline = wanted_ns + int(timeout_s * 1e9)
        while True:
            self._drain()
            now = time.monotonic_ns()
            if len(self.held) >= slabs or now > deadline:
                return {"wanted_ns": wanted_ns, "granted_ns": now, "held": sorted(self.held)}
            time.sleep(POLL_S)

    def do_return(self, slabs: list[int]) -> dict[str, Any]:
        returned = [slab for slab in slabs if self.valve.give_back(slab)]
        self.held -= set(returned)
        return {"returned": returned}

    def do_fill(self, slabs: list[int], byte: int) -> dict[str, Any]:
        for slab in slabs:
            ctypes.memset(self._address(slab), byte, self._slab_bytes)
        return {}

    def do_overuse(self) -> dict[str, Any]:
        """Misbehave: open the arena's file behind libvalve's back and fill all of it. Needs root."""
        assert self.arena is not None
        first = self._address(min(self.held))
        for entry in os.listdir("/proc/self/map_files"):
            if int(entry.partition("-")[0], 16) != first:
                continue
            fd = os.open(f"/proc/self/map_files/{entry}", os.O_RDWR)
            with mmap.mmap(fd, self.arena.nbytes) as memory:
                for at in range(0, self.arena.nbytes, mmap.PAGESIZE):
                    memory[at] = 1
            return {"filled": self.arena.nbytes}
        return {"filled": 0}

    def do_check(self, slabs: list[int]) -> dict[str, Any]:
        """For each slab the byte that fills it, or None if it holds different bytes."""
        found: dict[int, int | None] = {}
        for slab in slabs:
            data = ctypes.string_at(self._address(slab), self._slab_bytes)
            found[slab] = data[0] if data == data[:1] * len(data) else None
        return {"bytes": found}

    def do_own(
        self, owned: dict[str, list[int]], tokens: dict[str, int], pinned: list[int]
    ) -> dict[str, Any]:
        """`owned`: request slot -> slabs; `tokens`: request slot -> tokens to recompute."""
        valve = self.valve
        valve.ledger_begin()
        for slot, count in tokens.items():
            valve.ledger_request(int(slot), count)
        for slot, slabs in owned.items():
            for slab in slabs:
                valve.ledger_own(slab, int(slot))
        for slab in pinned:
            valve.ledger_pin(slab)
        valve.ledger_commit()
        return {}

    def do_busy(self) -> dict[str, Any]:
        at_ns = time.monotonic_ns()
        self.valve.busy()
        return {"at_ns": at_ns}

    def do_idle(self, decode_gap_ns: int = 0) -> dict[str, Any]:
        self.valve.idle(decode_gap_ns)
        return {}

    def do_count(self, counter: int, n: int) -> dict[str, Any]:
        self.valve.count(counter, n)
        return {}

    def do_spin(self, threads: int) -> dict[str, Any]:
        for _ in range(threads):
            threading.Thread(target=_spin, daemon=True).start()
        return {}

    def _drain(self) -> list[tuple[int, int]]:
        events = []
        while (event := self.valve.poll()) is not None:
            kind, slab = event
            events.append(event)
            if kind == _lib.GRANTED:
                self.held.add(slab)
            else:
                self.held.discard(slab)
                self.lost.append(slab)
        return events

    @property
    def _slab_bytes(self) -> int:
        assert self.arena is not None
        return self.arena.slab_bytes

    def _address(self, slab: int) -> int:
        assert self.arena is not None
        return self.arena.base + slab * self.arena.slab_bytes


def _spin() -> None:
    while True:
        sum(range(10_000))


def main() -> int:
    tenant = Tenant()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = {"ok": True, **getattr(tenant, "do_" + name)(**command)}
        except _lib.ValveError as error:
            answer = {"ok": False, "error": str(error)}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
