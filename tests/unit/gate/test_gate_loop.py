# SPDX-License-Identifier: Apache-2.0
"""The gate's loop on a device that only takes notes: what is read, what is done, in which order."""

from __future__ import annotations

import marshal
import os
import time

import pytest
from gate_bench import Bench, set_busy

from valve_agent.gate import STRIKES_MAX
from valve_agent.shared import Gate as GateState


def names(bench: Bench) -> list[str]:
    return [event["event"] for event in bench.events()]


@pytest.mark.parametrize(
    ("what", "was_busy", "now_busy", "changes", "actions", "events", "missed"),
    [
        ("turned busy", False, True, 1, ["pause"], ["busy", "pause"], 0),
        ("turned idle", True, False, 1, ["resume"], ["idle", "resume"], 0),
        ("nothing changed", False, False, 0, [], [], 0),
        ("a whole busy period was missed", False, False, 2, [], ["missed_busy"], 1),
        ("three of them were missed", False, False, 6, [], ["missed_busy"], 3),
        ("idle and busy again between two looks", True, True, 2, [], ["missed_busy"], 1),
        ("one missed, busy now", False, True, 3, ["pause"], ["busy", "missed_busy"], 1),
        ("one missed, idle now", True, False, 3, ["resume"], ["idle", "missed_busy"], 1),
        ("the level is ahead of its count", False, True, 0, ["pause"], ["busy"], 0),
        ("the count is ahead of its level", False, False, 1, [], [], 0),
    ],
)
def test_a_look_at_a_page(
    bench: Bench,
    what: str,
    was_busy: bool,
    now_busy: bool,
    changes: int,
    actions: list[str],
    events: list[str],
    missed: int,
) -> None:
    bench.target(2, pid=50)
    page = bench.engine(1, busy=was_busy)
    bench.events()
    bench.compute.log.clear()
    set_busy(page, now_busy, changes=changes)
    bench.ring()
    assert [action for action, _ in bench.compute.log] == actions, what
    seen = names(bench)
    assert set(events) <= set(seen), what
    assert bench.stats.read().counters["missed_busy"] == missed, what


@pytest.mark.parametrize(("level_first", "what"), [(True, "busy, then its count"), (False, "the other way")])
def test_two_looks_into_one_change_count_once(bench: Bench, level_first: bool, what: str) -> None:
    """The runtime can be stopped between its two stores."""
    bench.target(2, pid=50)
    page = bench.engine(1)
    if level_first:
        page._at.busy = 1
    else:
        page._at.busy_seq += 1
    bench.ring()
    page._at.busy, page._at.busy_seq = 1, 1
    bench.ring()
    assert names(bench).count("busy") == 1, what
    assert bench.stats.read().counters["missed_busy"] == 0, what
    assert not bench.compute.running_pids


def test_events_leave_after_the_pause_and_tell_its_latency(bench: Bench) -> None:
    bench.target(2, pid=50)
    page = bench.engine(1)
    bench.events()
    before_ns = time.monotonic_ns()
    set_busy(page, True, since_ns=before_ns)
    bench.ring()
    pause = next(event for event in bench.events() if event["event"] == "pause")
    assert pause["reason"] == "busy"
    assert pause["conn"] == 1
    assert pause["targets"] == 1
    assert pause["t_ns"] == before_ns + round(pause["latency_us"] * 1000)
    assert 0 < pause["stop_us"] <= pause["latency_us"]
    assert bench.stats.read().latency_ns == (round(pause["latency_us"] * 1000),)


@pytest.mark.parametrize(
    ("what", "since_ns"),
    [("in the future", time.monotonic_ns() + 10**15), ("an hour ago", time.monotonic_ns() - 3600 * 10**9)],
)
def test_a_clock_that_cannot_be_true_gives_no_sample(bench: Bench, what: str, since_ns: int) -> None:
    bench.target(2, pid=50)
    page = bench.engine(1)
    set_busy(page, True, since_ns=max(1, since_ns))
    bench.ring()
    counters = bench.stats.read().counters
    assert (counters["samples"], counters["bad_clocks"], counters["pauses"]) == (0, 1, 1), what
    assert not bench.compute.running_pids


def test_pages_tell_the_gate_and_its_heartbeat(bench: Bench) -> None:
    offline, online = bench.target(2, pid=50), bench.engine(1)
    assert {offline.gate, online.gate} == {GateState.OPEN}
    before_ns = time.monotonic_ns()
    set_busy(online, True)
    bench.ring()
    assert {offline.gate, online.gate} == {GateState.PAUSED}
    assert min(offline.heartbeat_ns, online.heartbeat_ns) >= before_ns


def test_a_process_that_attaches_while_closed_is_paused_before_the_answer(bench: Bench) -> None:
    bench.engine(1, busy=True)
    page = bench.target(2, pid=50)
    assert not bench.compute.running_pids
    assert page.gate == GateState.PAUSED


def test_a_busy_engine_that_disconnects_lets_offline_go_on(bench: Bench) -> None:
    bench.engine(1, busy=True)
    bench.target(2, pid=50)
    assert bench.call("remove", (1,)) is None
    assert bench.compute.running_pids == {50}


def test_a_lost_process_stays_paused_until_it_is_back(bench: Bench) -> None:
    online = bench.engine(1)
    for conn, pid in ((2, 50), (3, 51)):
        bench.target(conn, pid)
    assert bench.compute.running_pids == {50, 51}
    bench.call("remove", (2,))
    assert bench.compute.running_pids == {51}, "nobody can tell 50 anything"
    for busy in (True, False):
        set_busy(online, busy)
        bench.ring()
    assert bench.compute.running_pids == {51}, "an open gate is not for 50"
    bench.target(4, 50)
    assert bench.compute.running_pids == {50, 51}


def test_a_lost_process_found_by_the_scan_follows_the_gate(bench: Bench) -> None:
    bench.target(2, pid=50)
    bench.call("remove", (2,))
    bench.call("scan_add", (50,), os.pidfd_open(os.getpid()))
    assert bench.compute.running_pids == {50}


def test_the_number_of_a_dead_process_can_come_again(bench: Bench) -> None:
    bench.target(2, pid=50)
    bench.call("remove", (2,))
    bench.compute.gone.add(50)
    bench.compute.running_pids.clear()
    bench.call("scan_add", (50,), os.pidfd_open(os.getpid()))
    assert bench.compute.running_pids == {50}, "the new one was opened, not the dead one revived"


def test_a_process_that_the_scan_drops_goes_on(bench: Bench) -> None:
    bench.engine(1, busy=True)
    bench.call("scan_add", (60,), os.pidfd_open(os.getpid()))
    assert not bench.compute.running_pids
    bench.call("scan_remove", (60,))
    assert bench.compute.running_pids == {60}


def test_an_attach_that_times_out_is_no_second_preemption(bench: Bench) -> None:
    bench.engine(1, busy=True)
    bench.events()
    before = bench.stats.read().counters["pauses"]
    bench.compute.refuses_to_stop = {50}
    bench.target(2, pid=50)
    bench.compute.refuses_to_stop = set()
    bench.turn()
    assert names(bench) == ["pause_timeout", "pause_confirmed"]
    assert bench.stats.read().counters["pauses"] == before


def held(bench: Bench) -> list[int]:
    """Tokens of the holds that were answered."""
    tokens = []
    while True:
        try:
            tokens.append(marshal.loads(bench.holds.recv(65536))[0])
        except BlockingIOError:
            return tokens


def ask_hold(bench: Bench, wanted: bool, token: int) -> None:
    bench.holds.send(marshal.dumps((wanted, token)))
    bench.turn()


def test_a_hold_is_answered_once_offline_is_off_and_not_before(bench: Bench) -> None:
    bench.target(2, pid=50)
    bench.compute.refuses_to_stop = {50}
    ask_hold(bench, True, 7)
    assert held(bench) == []
    bench.turn()
    assert held(bench) == [], "the second attempt failed as well"
    bench.compute.refuses_to_stop = set()
    bench.turn()
    assert held(bench) == [7]
    assert names(bench).count("pause_timeout") == 1
    ask_hold(bench, False, 7)
    assert bench.compute.running_pids == {50}


def test_holds_nest_and_outlast_idle(bench: Bench) -> None:
    page = bench.engine(1)
    bench.target(2, pid=50)
    ask_hold(bench, True, 1)
    ask_hold(bench, True, 2)
    set_busy(page, True)
    bench.ring()
    set_busy(page, False)
    bench.ring()
    ask_hold(bench, False, 1)
    assert not bench.compute.running_pids
    ask_hold(bench, False, 2)
    assert bench.compute.running_pids == {50}


def test_what_cannot_be_paused_is_killed_and_the_event_says_why(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr("signal.pidfd_send_signal", lambda _fd, number: sent.append(number))
    page = bench.engine(1)
    for conn, pid in ((2, 50), (3, 51)):
        bench.target(conn, pid)
    bench.compute.refuses_to_stop = {50}
    set_busy(page, True)
    bench.ring()
    deadline = time.monotonic() + 10
    while len(sent) < 3 and time.monotonic() < deadline:
        bench.turn()
    assert len(sent) >= 3, "it is sent again as long as it is there"
    kills = [event for event in bench.events() if event["event"] == "kill"]
    assert [event["pid"] for event in kills] == [50], "told once; 51 did as it was told"
    assert "could not be paused" in kills[0]["why"]


def test_somebody_who_continues_a_paused_process_is_outdone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr("signal.pidfd_send_signal", lambda _fd, number: sent.append(number))
    bench.engine(1, busy=True)
    bench.target(2, pid=50)
    for strike in range(1, STRIKES_MAX + 1):
        bench.compute.running_pids.add(50)
        bench.gate._beat_ns = 0  # a heartbeat is due
        bench.turn()
        assert not bench.compute.running_pids
        assert bench.stats.read().counters["violations"] == strike
        assert bool(sent) == (strike == STRIKES_MAX)


def test_a_gate_that_slept_longer_than_the_lease_wakes_its_targets(bench: Bench) -> None:
    """Their runtimes have stopped them by then."""
    bench.target(2, pid=50)
    bench.engine(1)
    bench.compute.running_pids.clear()
    bench.gate._beat_ns = 0
    bench.turn()
    assert bench.compute.running_pids == {50}


def test_a_ring_that_got_lost_is_noticed_by_the_heartbeat(bench: Bench) -> None:
    page = bench.engine(1)
    bench.target(2, pid=50)
    set_busy(page, True)
    bench.gate._beat_ns = 0
    bench.turn()
    assert not bench.compute.running_pids


def test_a_refused_page_leaves_nothing_behind(bench: Bench) -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 4096)
    answer = bench.call("engine", (1, 1), fd)
    os.close(fd)
    assert answer is not None
    assert "not sealed" in answer
    assert not bench.gate._pages
