# SPDX-License-Identifier: Apache-2.0
"""Memory that comes and goes: promise P3 without an engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from fake_agent import SLAB_BYTES, AgentArena, FakeAgent, Link
from victims import Victim, wait_until

from valve_agent import wire

Start = Callable[..., Victim]
Opened = tuple[Victim, Link, AgentArena]


def open_arena(agent: FakeAgent, victim: Victim, role: wire.Role, slabs: int) -> tuple[Link, AgentArena]:
    if role == wire.Role.OFFLINE:
        link = agent.accept()
        link.welcome(role)
        victim.line()
        victim.tell(f"open {slabs * SLAB_BYTES} 20000")
    else:
        victim.line()
        victim.tell(f"open {slabs * SLAB_BYTES} 20000")
        link = agent.accept()
        link.welcome(role, agent.doorbell)
    arena = link.serve_arena()
    assert victim.line() == f"arena {slabs} {SLAB_BYTES} 1", "slabs, bytes of one, aligned to 2 MiB"
    return link, arena


@pytest.fixture(params=[wire.Role.OFFLINE, wire.Role.ONLINE], ids=["offline", "online"])
def opened(request: pytest.FixtureRequest, agent: FakeAgent, start: Start, variant: str) -> Iterator[Opened]:
    """A victim with an arena of 8 slabs."""
    victim = start(request.param.name.lower(), variant)
    link, arena = open_arena(agent, victim, request.param, 8)
    yield victim, link, arena
    arena.close()


@pytest.fixture
def offline(agent: FakeAgent, start: Start, variant: str) -> Iterator[Opened]:
    victim = start("offline", variant)
    link, arena = open_arena(agent, victim, wire.Role.OFFLINE, 8)
    yield victim, link, arena
    arena.close()


def wait_events(victim: Victim, *expected: str) -> None:
    seen: list[str] = []

    def drained() -> bool:
        seen.extend(victim.ask("events").split()[1:])
        return len(seen) >= len(expected)

    wait_until(drained, f"events {expected}; seen {seen}")
    assert seen == list(expected)


def test_ungranted_slabs_read_and_write_but_reach_no_memory(opened: Opened) -> None:
    victim, _, arena = opened
    assert victim.ask("read 5") == "read 0 0"
    assert victim.ask("fill 5 9") == "ok"
    assert arena.resident_bytes() == 0
    assert victim.ask("read 2") == "read 9 9", "every slab lies on the same quarantine page"


def test_granted_slabs_hold_what_is_written(opened: Opened) -> None:
    victim, link, arena = opened
    link.grant({1, 2, 7})
    wait_events(victim, "G1", "G2", "G7")
    for slab in (1, 2, 7):
        victim.ask(f"fill {slab} {slab + 100}")
    assert [arena.byte(slab) for slab in (1, 2, 7)] == [101, 102, 107]
    assert arena.resident_bytes() == 3 * SLAB_BYTES
    assert victim.ask("read 2") == "read 102 102"


def test_a_stopped_process_loses_slabs_without_a_fault(offline: Opened) -> None:
    victim, link, arena = offline
    link.grant(range(6))
    wait_events(victim, *(f"G{slab}" for slab in range(6)))
    for slab in range(6):
        victim.ask(f"fill {slab} {slab + 1}")
    victim.ask("hammer")
    wait_until(lambda: victim.ask("touches") != "touches 0", "it touches the arena")
    victim.stop()
    before = arena.resident_bytes()
    link.reclaim({0, 1, 2, 5})  # answered while every thread of the process is stopped
    assert victim.is_stopped()
    for slab in (0, 1, 2, 5):
        arena.punch(slab)
    assert arena.resident_bytes() == before - 4 * SLAB_BYTES == 2 * SLAB_BYTES
    victim.resume()
    assert victim.ask("events") == "events L0 L1 L2 L5"
    assert victim.ask("read 3") == "read 4 4", "what was not taken is as it was"
    now = victim.ask("touches")
    wait_until(lambda: victim.ask("touches") != now, "it still touches every slab")
    assert arena.resident_bytes() == 2 * SLAB_BYTES, "touching lost slabs brings no memory back"


def test_reclaims_under_fire(opened: Opened) -> None:
    """Slabs come and go at random while a thread touches all of them: no fault, and no event is missing."""
    victim, link, _ = opened
    victim.ask("hammer")
    dice = random.Random(1)
    held: set[int] = set()
    believed: set[int] = set()
    for _ in range(150):
        change = {slab for slab in range(8) if dice.random() < 0.5}
        link.grant(change - held)
        link.reclaim(change & held)
        held ^= change
        if dice.random() < 0.3:
            for event in victim.ask("events").split()[1:]:
                slab = int(event[1:])
                assert (slab in believed) == (event[0] == "L"), f"{event} while it believes {believed}"
                believed ^= {slab}
    link.reclaim(set())  # everything before it has been handled
    for event in victim.ask("events").split()[1:]:
        believed ^= {int(event[1:])}
    assert believed == held
    assert victim.ask("touches") != "touches 0"


@pytest.mark.parametrize(
    ("what", "story", "events"),
    [
        ("granted and lost before anyone asked", "+1 -1", ""),
        ("lost and granted again: its contents are gone", "+1 ? -1 +1", "L1 G1"),
        ("lost, granted, lost: one loss", "+1 ? -1 +1 -1", "L1"),
        ("lost, granted, lost, granted: still one loss and one grant", "+1 ? -1 +1 -1 +1", "L1 G1"),
        ("losses come first", "+3 ? +1 -3", "L3 G1"),
        ("two lost, one of them back", "+1 +2 ? -1 -2 +2", "L1 L2 G2"),
        ("granted, lost, granted", "+1 -1 +1", "G1"),
        ("the same grant twice", "+1 ? +1", ""),
        ("the same loss twice", "+1 ? -1 -1", "L1"),
    ],
)
def test_events_tell_the_difference(
    agent: FakeAgent, start: Start, what: str, story: str, events: str
) -> None:
    victim = start("offline")
    link, arena = open_arena(agent, victim, wire.Role.OFFLINE, 4)
    for step in story.split():
        if step == "?":
            link.reclaim(set())
            victim.ask("events")
        elif step[0] == "+":
            link.grant({int(step[1:])})
        else:
            link.reclaim({int(step[1:])})
    link.reclaim(set())
    assert victim.ask("events").split()[1:] == events.split(), what
    assert victim.ask("events") == "events"
    arena.close()


def test_lost_events_can_be_dropped_on_purpose(agent: FakeAgent, start: Start) -> None:
    """The switch by which other tests prove that they would notice."""
    victim = start("offline", VALVE_FAULT="drop-lost")
    link, arena = open_arena(agent, victim, wire.Role.OFFLINE, 4)
    link.grant({0, 1})
    link.reclaim(set())
    assert victim.ask("events") == "events G0 G1"
    link.reclaim({0})
    link.grant({2})
    link.reclaim(set())
    assert victim.ask("events") == "events G2"
    arena.close()


def test_returned_slabs_are_remapped_before_the_agent_hears(opened: Opened) -> None:
    victim, link, arena = opened
    link.grant({0, 1})
    wait_events(victim, "G0", "G1")
    victim.ask("fill 1 77")
    assert victim.ask("return 1") == "return 0"
    assert set(link.expect(wire.Return).set) == {1}
    assert victim.ask("read 1") == "read 0 0"
    victim.ask("fill 1 5")
    assert arena.byte(1) == 77, "what it writes now does not reach the slab"
    assert victim.ask("return 1") == "return -1", "it is not held any more"
    assert victim.ask("return 99") == "return -1", "no such slab"
    assert victim.ask("events") == "events"
    link.grant({1})
    wait_events(victim, "G1")
    assert victim.ask("read 1") == "read 77 77", "the agent did not punch it"


def test_a_return_and_a_reclaim_of_the_same_slab_meet(offline: Opened) -> None:
    victim, link, _ = offline
    link.grant({0, 1})
    wait_events(victim, "G0", "G1")
    link.send(wire.Reclaim(id=3, set=wire.Bitmap.of({1})))
    victim.ask("return 1")
    frames = [link.expect(wire.Slabs)]
    if isinstance(frames[0], wire.Return):
        frames.append(link.expect(wire.Slabs))
    assert isinstance(frames[-1], wire.Reclaimed)
    assert frames[-1].id == 3
    link.reclaim({1})
    link.grant({1})
    link.reclaim(set())
    events = victim.ask("events").split()[1:]
    assert events in (["G1"], ["L1", "G1"]), "one history or the other, never a slab without its event"


def test_a_stopped_process_that_was_about_to_return(offline: Opened) -> None:
    """The helper, not the stopped thread, does the returning: nothing is left half done."""
    victim, link, _ = offline
    link.grant(range(8))
    wait_events(victim, *(f"G{slab}" for slab in range(8)))
    for slab in range(8):
        victim.tell(f"return {slab}")
    victim.stop()
    link.send(wire.Reclaim(id=1, set=wire.Bitmap.of(range(8))))
    returned: set[int] = set()
    while not isinstance(frame := link.expect(wire.Slabs), wire.Reclaimed):
        returned |= set(frame.set)
    victim.resume()
    answers = [victim.line() for _ in range(8)]
    lost = {int(event[1:]) for event in victim.ask("events").split()[1:]}
    accepted = {slab for slab, answer in enumerate(answers) if answer == "return 0"}
    assert returned <= accepted
    assert lost == set(range(8)) - accepted


def test_want_is_sent_once_there_is_an_arena_and_again_to_a_new_agent(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    link = agent.accept()
    link.welcome(wire.Role.OFFLINE)
    victim.line()
    assert victim.ask("want 3 1") == "want 0"
    victim.tell(f"open {4 * SLAB_BYTES} 20000")
    arena = link.serve_arena()
    want = link.expect(wire.Want)
    assert (want.total, want.urgent) == (3, 1)
    link.close()
    link = agent.accept()
    assert link.welcome(wire.Role.OFFLINE).arena_slabs == 4
    link.expect(wire.ArenaRestore)
    assert link.expect(wire.Want).total == 3
    arena.close()


def test_zero_bytes_means_the_tenants_limit(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    link = agent.accept()
    link.welcome(wire.Role.OFFLINE, slabs_limit=11)
    victim.line()
    victim.tell("open 0 20000")
    arena = link.serve_arena()
    assert victim.line() == f"arena 11 {SLAB_BYTES} 1"
    assert victim.ask("open 1 0") == f"arena 11 {SLAB_BYTES} 1", "a process has one arena"
    arena.close()


@pytest.mark.parametrize(
    ("what", "quarantine_bytes"),
    [
        ("one page for a slab: more mappings than a process may have by default", 4096),
        ("as large as a slab", SLAB_BYTES),
    ],
)
def test_quarantine_of_any_size(agent: FakeAgent, start: Start, what: str, quarantine_bytes: int) -> None:
    victim = start("offline")
    link = agent.accept()
    link.welcome(wire.Role.OFFLINE)
    victim.line()
    victim.tell(f"open {64 * SLAB_BYTES} 20000")
    arena = link.serve_arena(quarantine_bytes)
    assert victim.line() == f"arena 64 {SLAB_BYTES} 1", what
    victim.ask("hammer")
    for _ in range(3):
        link.grant(range(0, 64, 2))
        link.reclaim(range(0, 64, 2))
        assert victim.ask("read 63") == "read 0 0"
    arena.close()


def test_a_process_without_mappings_left_still_gives_its_slabs(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    link = agent.accept()
    link.welcome(wire.Role.OFFLINE)
    victim.line()
    victim.tell(f"open {64 * SLAB_BYTES} 20000")
    arena = link.serve_arena(8192)  # as many mappings as libvalve allows itself
    victim.line()
    victim.ask("hammer")
    link.grant(range(0, 64, 2))  # each slab is one mapping now, instead of 512
    link.reclaim(set())
    assert int(victim.ask("eat-mappings").split()[1]) > 1000
    victim.stop()
    link.reclaim(range(0, 64, 2))
    victim.resume()
    assert victim.ask("read 0") == "read 0 0"
    before = victim.ask("touches")
    wait_until(lambda: victim.ask("touches") != before, "every slab can be touched")
    arena.close()


def test_a_denied_arena_carries_the_sentence_and_may_be_asked_again(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    link = agent.accept()
    link.welcome(wire.Role.OFFLINE)
    victim.line()
    victim.tell(f"open {1000 * SLAB_BYTES} 20000")
    assert link.expect(wire.ArenaOpen).slabs == 1000
    link.send(wire.Denied(code=wire.RejectCode.EARENA, text=b"1000 slabs are more than the 8 of this tenant"))
    assert victim.line() == "denied 1000 slabs are more than the 8 of this tenant"
    victim.tell(f"open {8 * SLAB_BYTES} 20000")
    arena = link.serve_arena()
    assert victim.line() == f"arena 8 {SLAB_BYTES} 1"
    arena.close()


def test_an_arena_larger_than_any_is_refused_without_asking(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    link = agent.accept()
    link.welcome(wire.Role.OFFLINE)
    victim.line()
    answer = victim.ask(f"open {2**63} 20000")
    assert answer.startswith("denied the arena asked for has more than 4096 slabs: ask for less, or raise")


def test_no_agent_no_arena_but_a_sentence(agent: FakeAgent, start: Start) -> None:
    agent.close()
    victim = start("online")
    victim.line()
    answer = victim.ask("open 4096 300")
    assert answer.startswith("denied no arena in time: the agent at ")
    assert answer.endswith("does not answer; is `valve agent` running?")


def test_the_ledger_is_read_whole_or_not_at_all(offline: Opened) -> None:
    victim, _, arena = offline
    assert arena.ledger.read().updates == 0
    victim.ask("ledger request:0:100 request:1023:7 own:3:0 own:3:1023 own:4:64 pin:2 commit")
    first = arena.ledger.read()
    assert first.updates == 1
    assert (first.tokens[0], first.tokens[1023], first.tokens[1]) == (100, 7, 0)
    assert first.pinned == 1 << 2
    assert first.owners == (0, 0, 0, 1 | 1 << 1023, 1 << 64, 0, 0, 0)
    victim.ask("ledger request:5:50 own:1:5")  # stopped here: not committed
    assert arena.ledger.read() == first
    victim.ask("ledger request:6:60 own:1:6 commit")
    second = arena.ledger.read()
    assert second.updates == 2
    assert second.owners[1] == 1 << 6
    assert second.tokens[5] == 0, "the abandoned draft left nothing"
    assert second.owners[3] == 0
    victim.ask("ledger request:1024:1 own:8:0 own:0:1024 pin:8 commit")  # outside: ignored
    assert arena.ledger.read().owners == (0,) * 8
