# SPDX-License-Identifier: Apache-2.0
"""When the agent is gone: offline stops itself (P6), online goes on (P5), and both come back."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from fake_agent import SLAB_BYTES, FakeAgent
from test_arena import open_arena
from victims import Victim, wait_until

from valve_agent import wire
from valve_agent.shared import Ledger

Start = Callable[..., Victim]
ONLINE, OFFLINE = wire.Role.ONLINE, wire.Role.OFFLINE


def test_offline_stops_when_its_agent_dies(agent: FakeAgent, start: Start, variant: str) -> None:
    agent.lease_ms = 3_600_000  # so that it is the end of the connection that it acts on
    victim = start("offline", variant)
    agent.accept().welcome(OFFLINE)
    victim.line()
    agent.close()
    victim.wait_stopped()
    victim.wait_said("is gone; this offline process is stopped until it is back")


def test_offline_stops_when_the_heartbeat_stops(agent: FakeAgent, start: Start, variant: str) -> None:
    agent.lease_ms = 800
    victim = start("offline", variant)
    link = agent.accept()
    link.welcome(OFFLINE)
    victim.line()
    time.sleep(2 * link.lease_ms / 1000)
    assert not victim.is_stopped(), "it lives on heartbeats"
    link.stop_heart()
    victim.wait_stopped()
    age_ms = (time.monotonic_ns() - link.page.heartbeat_ns) / 1e6
    assert age_ms >= link.lease_ms, "it stopped before the lease was over"
    link.expect_end()  # a new connection tells the agent that it stopped
    again = agent.accept()
    hello = again.welcome(OFFLINE)
    assert hello.flags & wire.HelloFlag.HELPER
    assert hello.main_pid == victim.pid
    assert victim.is_stopped(), "only the agent lets it run again"
    victim.resume()
    assert victim.ask("attach 20000") == "attach 1"


def test_offline_cannot_be_continued_by_others(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    agent.accept().welcome(OFFLINE)
    victim.line()
    agent.close()
    victim.wait_stopped()
    for _ in range(3):
        victim.resume()
        victim.wait_stopped()


def test_offline_stops_although_nobody_reads_its_stderr(agent: FakeAgent, start: Start) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(4096)):
            continue
    os.set_blocking(writer, True)
    victim = start("offline", stderr=writer)
    agent.accept().welcome(OFFLINE)
    victim.line()
    agent.close()
    victim.wait_stopped()
    agent.listen()
    agent.accept().welcome(OFFLINE)
    victim.resume()
    assert victim.ask("attach 20000") == "attach 1", "its helper does not hang in a message"
    os.close(reader)
    os.close(writer)


def test_offline_comes_back_with_its_arena(agent: FakeAgent, start: Start, variant: str) -> None:
    victim = start("offline", variant)
    link, arena = open_arena(agent, victim, OFFLINE, 8)
    link.grant({0, 3, 4})
    link.reclaim({4})
    victim.ask("fill 3 42")
    victim.ask("ledger request:9:90 own:3:9 commit")
    arena.close()  # an agent that is killed loses its descriptors
    agent.close()
    victim.wait_stopped()
    agent.listen()
    link = agent.accept()
    hello = link.welcome(OFFLINE)
    assert hello.arena_slabs == 8
    restore = link.expect(wire.ArenaRestore)
    assert restore.slabs == 8
    assert set(restore.held) == {0, 3}
    memory, quarantine, ledger_fd = link.fds
    assert os.fstat(memory).st_size == 8 * SLAB_BYTES
    assert os.fstat(quarantine).st_size == SLAB_BYTES
    assert os.pread(memory, 1, 3 * SLAB_BYTES) == b"\x2a"
    ledger = Ledger(ledger_fd, 8)
    assert ledger.read().owners[3] == 1 << 9
    ledger.close()
    for fd in link.fds:
        os.close(fd)
    assert victim.is_stopped()
    link.reclaim({3})  # while it is still stopped
    victim.resume()
    assert victim.ask("events") == "events G0", "slab 3 came and went before it asked"
    link.grant({5})
    link.reclaim(set())
    assert victim.ask("events") == "events G5"


def test_online_goes_on_when_its_agent_dies(agent: FakeAgent, start: Start, variant: str) -> None:
    victim = start("online", variant)
    link, arena = open_arena(agent, victim, ONLINE, 8)
    link.grant({1, 2})
    link.reclaim(set())
    victim.ask("fill 1 11")
    victim.ask("busy")
    victim.ask("count 1 500")
    assert link.page.busy
    agent.close()
    for _ in range(20):
        assert victim.ask("read 1") == "read 11 11"
    assert not victim.is_stopped()
    victim.ask("count 1 5")
    agent.rings()
    agent.listen()
    link = agent.accept()
    hello = link.welcome(ONLINE, agent.doorbell)
    assert hello.arena_slabs == 8
    assert set(link.expect(wire.ArenaRestore).held) == {1, 2}
    for fd in link.fds:
        os.close(fd)
    wait_until(lambda: agent.rings() > 0, "the new agent's doorbell rings")
    assert link.page.busy, "it was busy before this agent was there"
    assert link.page.tokens == 505, "counters are those of the process, not of the connection"
    victim.ask("idle 1000")
    assert not link.page.busy
    assert agent.rings() > 0
    arena.close()


def test_online_says_once_that_there_is_no_heartbeat(agent: FakeAgent, start: Start) -> None:
    agent.lease_ms = 800
    victim = start("online")
    victim.line()
    victim.tell("attach 20000")
    link = agent.accept()
    link.welcome(ONLINE, agent.doorbell)
    victim.line()
    link.stop_heart()
    victim.wait_said("no heartbeat from the agent; this process goes on without it")
    time.sleep(3 * link.lease_ms / 1000)
    assert victim.stderr().count("no heartbeat") == 1
    assert victim.ask("state").startswith("state role 1 connected 1")


def test_online_never_waits_for_an_agent_that_does_not_read(agent: FakeAgent, start: Start) -> None:
    victim = start("online")
    link, arena = open_arena(agent, victim, ONLINE, 8)
    for _ in range(20):  # many times what the socket holds
        assert victim.ask("wants 2000") == "ok"
        victim.ask("busy")
        victim.ask("idle 1")
    assert victim.ask("state").startswith("state role 1")
    assert link.page.busy_seq == 40
    arena.close()


def test_a_bad_frame_ends_the_connection_not_the_process(agent: FakeAgent, start: Start) -> None:
    """Offline is stopped until there is an agent that makes sense."""
    victim = start("offline")
    link, arena = open_arena(agent, victim, OFFLINE, 4)
    link.grant({0})
    for what, data in (
        ("random bytes", b"\x13" * 544),
        ("too short", bytes(wire.Grant())[:-1]),
        ("too long", bytes(wire.Grant()) + b"x"),
        ("far too long", bytes(4000)),
        ("a frame that agents do not send", bytes(wire.Want())),
        ("a second WELCOME, without its descriptor", bytes(wire.Welcome())),
        ("a sentence without an end", bytes(wire.Denied(text=b"x" * wire.TEXT_BYTES))),
    ):
        link.sock.sendall(data)
        link.expect_end()
        victim.wait_stopped()
        link = agent.accept()
        link.welcome(OFFLINE)
        assert set(link.expect(wire.ArenaRestore).held) == {0}, what
        for fd in link.fds:
            os.close(fd)
        victim.resume()
        assert victim.ask("attach 20000") == "attach 1", what
    arena.close()
