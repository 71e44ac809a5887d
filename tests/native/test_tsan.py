# SPDX-License-Identifier: Apache-2.0
"""Many threads on the API while the agent grants, reclaims, dies and returns: no data race.

ThreadSanitizer does not know processes that share memory, so the control loop of an offline process runs
as a thread in this build; online is what ships.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from fake_agent import FakeAgent, Link
from test_arena import open_arena
from victims import HERE, Victim, build, compile_program, sanitizer_environment, unrandomized

from valve_agent import wire

Start = Callable[..., Victim]


@pytest.mark.parametrize("role", [wire.Role.ONLINE, wire.Role.OFFLINE], ids=["online", "offline"])
def test_no_data_race(agent: FakeAgent, start: Start, role: wire.Role) -> None:
    agent.lease_ms = 60_000
    victim = start(role.name.lower(), "thread")
    link, arena = open_arena(agent, victim, role, 8)
    dice = random.Random(2)
    victim.tell("storm 4 5000")

    def turn(slabs: Iterable[int], *, dies: bool = False) -> None:
        """One grant and one reclaim. A storm may fill the connection faster than it is read here; then
        libvalve gives it up, as it should, and comes again."""
        nonlocal link
        try:
            if dies:
                raise ConnectionResetError("the agent dies")
            link.send(wire.Grant(set=wire.Bitmap.of(slabs)))
            link.send(wire.Reclaim(id=1, set=wire.Bitmap.of(slabs)))
            drain(link, wire.Reclaimed)
        except (BrokenPipeError, ConnectionResetError, wire.ConnectionClosed):
            link.close()
            link = agent.accept()
            link.welcome(role, agent.doorbell if role == wire.Role.ONLINE else None)
            drain(link, wire.ArenaRestore)

    for number in range(60):
        turn([slab for slab in range(8) if dice.random() < 0.5], dies=number % 20 == 19)
    while victim.silent_for(0.05):
        turn(range(8))
    assert victim.line() == "ok"
    assert victim.end() == 0, victim.stderr()
    arena.close()


def test_the_sanitizer_would_notice(agent: FakeAgent, start: Start, tmp_path: Path) -> None:
    """One store of the API made plain is reported: the check has power."""
    copy = tmp_path / "native"
    shutil.copytree(build.NATIVE, copy)
    engine = copy / "src" / "engine.c"
    plain = "*(volatile uint32_t *)&valve.want_total = total_slabs;"
    text = engine.read_text()
    engine.write_text(text.replace("atomic_store(&valve.want_total, total_slabs);", plain))
    assert engine.read_text() != text
    sources = [str(copy / "src" / source.name) for source in build.sources()]
    program = compile_program(tmp_path / "racy", HERE / "victim.c", *sources, sanitize="thread")
    environment = {
        **os.environ,
        **sanitizer_environment(),
        "VALVE_SOCKET": str(agent.path),
        "VALVE_WORKLOAD": "online",
    }
    victim = Victim(unrandomized([str(program)]), environment, tmp_path / "stderr")
    try:
        link, arena = open_arena(agent, victim, wire.Role.ONLINE, 8)
        assert victim.ask("storm 4 500") == "ok"
        assert victim.end() == 99
        assert "ThreadSanitizer: data race" in victim.stderr()
        arena.close()
        link.close()
    finally:
        victim.kill()


def drain(link: Link, until: type[wire.Frame]) -> None:
    """Read frames up to one of this kind; it sends what it likes in between."""
    while not isinstance(link.expect(wire.Frame), until):
        continue
