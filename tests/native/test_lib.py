# SPDX-License-Identifier: Apache-2.0
"""The Python binding in real Python processes, with and without the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_agent import SLAB_BYTES, FakeAgent

from valve_agent import wire

ONLINE = """
import ctypes, sys
from valve_runtime import _lib
valve = _lib.load()
assert valve is _lib.load()
assert valve.present and valve.role() == _lib.ROLE_ONLINE and valve.version()
assert valve.attach(20000) and valve.connected() and valve.last_error() == ""
arena = valve.arena_open(3 * {slab}, timeout_ms=20000)
assert (arena.slabs, arena.slab_bytes, arena.nbytes) == (3, {slab}, 3 * {slab})
valve.want(2, True)
events = []
while len(events) < 2:
    event = valve.poll()
    if event: events.append(event)
assert events == [(_lib.GRANTED, 0), (_lib.GRANTED, 2)]
memory = (ctypes.c_char * arena.nbytes).from_address(arena.base)
memory[2 * arena.slab_bytes] = b"Z"
assert valve.ledger_begin()
valve.ledger_request(4, 40); valve.ledger_own(2, 4); valve.ledger_pin(0); valve.ledger_commit()
valve.count(_lib.COUNT_TOKENS, 12)
valve.busy()
sys.stdin.readline()
assert valve.poll() == (_lib.LOST, 2)
assert not valve.give_back(2) and valve.give_back(0)
valve.idle(5)
sys.stdin.readline()
"""

ABSENT = """
from valve_runtime import _lib
valve = _lib.load()
assert not valve.present and valve.role() == _lib.ROLE_NONE and valve.version() == valve.last_error() == ""
valve.busy(); valve.idle(1); valve.count(0, 1); valve.want(1, False); valve.ledger_commit()
assert valve.poll() is None and not valve.ledger_begin() and not valve.connected()
try:
    valve.arena_open(1, timeout_ms=1)
except _lib.ArenaDenied as error:
    assert "valve run" in str(error)
else:
    raise SystemExit("an arena out of nothing")
"""


def environment(bundle: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(bundle / "python"), **more}


def test_online_through_python(agent: FakeAgent, bundle: Path, library: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", ONLINE.format(slab=SLAB_BYTES)],
        stdin=subprocess.PIPE,
        env=environment(
            bundle, LD_PRELOAD=str(library), VALVE_SOCKET=str(agent.path), VALVE_WORKLOAD="online"
        ),
    )
    with process:
        assert process.stdin is not None
        link = agent.accept()
        link.welcome(wire.Role.ONLINE, agent.doorbell)
        arena = link.serve_arena()
        want = link.expect(wire.Want)
        assert (want.total, want.urgent) == (2, 1)
        link.grant({0, 2})
        while not link.page.busy:
            assert process.poll() is None
        assert link.page.tokens == 12
        ledger = arena.ledger.read()
        assert (ledger.tokens[4], ledger.owners[2], ledger.pinned) == (40, 1 << 4, 1)
        assert arena.byte(2) == ord("Z")
        link.reclaim({2})
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert set(link.expect(wire.Return).set) == {0}
        while link.page.busy:
            assert process.poll() is None
        assert link.page.decode_gap_ns == 5
        assert agent.rings() > 0
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(20) == 0
        arena.close()


@pytest.mark.parametrize("preloaded", [False, True])
def test_nothing_happens_outside_a_tenant(bundle: Path, library: Path, preloaded: bool) -> None:
    code = ABSENT
    more = {}
    if preloaded:
        more["LD_PRELOAD"] = str(library)
        code = code.replace("not valve.present and", "valve.present and").replace("valve.version() == ", "")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment(bundle, **more),
        timeout=20,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
