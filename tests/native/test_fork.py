# SPDX-License-Identifier: Apache-2.0
"""fork and exec: a child is a process of its own, and an old helper disturbs nobody."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from fake_agent import SLAB_BYTES, FakeAgent
from test_arena import open_arena
from victims import Victim, children, state, wait_until

from valve_agent import wire

Start = Callable[..., Victim]
ONLINE, OFFLINE = wire.Role.ONLINE, wire.Role.OFFLINE


def test_a_forked_offline_child_attaches_anew(agent: FakeAgent, start: Start, variant: str) -> None:
    victim = start("offline", variant)
    link, arena = open_arena(agent, victim, OFFLINE, 4)
    link.grant({0})
    link.reclaim(set())
    victim.ask("fill 0 7")
    helper = victim.helper()
    victim.tell("fork")
    second = agent.accept()
    assert victim.silent_for(0.2), "the child ran before WELCOME"
    hello = second.welcome(OFFLINE)
    child = hello.main_pid
    assert child in children(victim.pid)
    assert hello.flags & wire.HelloFlag.HELPER
    assert hello.arena_slabs == 0
    assert victim.line() == f"child {child} role 2 mapped 0", "its parent's arena is not its own"
    assert second.page.busy
    assert second.page.tokens == 1000
    assert not link.page.busy, "it wrote into its parent's page"
    assert link.page.tokens == 0
    victim.tell("")  # lets the child end
    assert victim.line() == "status 0"
    second.expect_end()
    assert victim.helper() == helper
    link.reclaim({0})
    assert victim.ask("events") == "events", "slab 0 came and went unseen"
    arena.close()


def test_a_forked_online_child_is_untouched_until_it_uses_the_api(
    agent: FakeAgent, start: Start, variant: str
) -> None:
    victim = start("online", variant)
    link, arena = open_arena(agent, victim, ONLINE, 4)
    victim.tell("fork")
    second = agent.accept()  # because it says busy
    hello = second.welcome(ONLINE, agent.doorbell)
    assert victim.line() == f"child {hello.main_pid} role 1 mapped 0"
    wait_until(lambda: second.page.busy, "the child's busy is in the child's page")
    assert not link.page.busy
    victim.tell("")
    assert victim.line() == "status 0"
    arena.close()


def test_exec_makes_a_new_tenant_process_and_ends_the_old_helper(
    agent: FakeAgent, start: Start, variant: str
) -> None:
    victim = start("offline", variant)
    link, arena = open_arena(agent, victim, OFFLINE, 4)
    helper = victim.helper()
    victim.tell("exec")
    again = agent.accept()
    assert not select.select([link.sock], [], [], 0)[0], (
        "an agent stops a process whose connection it has lost"
    )
    link.close()  # as the agent does: the process has connected anew
    hello = again.welcome(OFFLINE)
    assert hello.main_pid == victim.pid
    assert hello.arena_slabs == 0, "exec took its arena away"
    assert victim.line() == f"ready {victim.pid}"
    assert victim.helper() != helper, "one helper, and no zombie of the old one"
    assert not victim.is_stopped(), "the old helper stopped a program that it does not serve"
    assert victim.ask("state").startswith("state role 2 connected 1")
    victim.tell(f"open {SLAB_BYTES} 20000")
    again.serve_arena().close()
    victim.line()
    arena.close()


def test_a_program_without_valve_stays_connected_through_its_old_helper(
    agent: FakeAgent, start: Start
) -> None:
    """It is the agent's to decide; the old helper neither stops it nor leaves it unaccounted for."""
    agent.lease_ms = 800
    victim = start("offline")
    link, arena = open_arena(agent, victim, OFFLINE, 4)
    link.grant({1, 2})
    assert victim.ask("exec-bare") == f"ready {victim.pid}"
    link.reclaim({1, 2})  # nobody uses the arena any more, but the agent need not know
    time.sleep(2 * link.lease_ms / 1000)
    link.stop_heart()
    time.sleep(2 * link.lease_ms / 1000)
    assert victim.ask("state").startswith("state role 0"), "it was stopped by a helper that does not serve it"
    link.expect_end()
    arena.close()


def test_exec_is_seen_where_kcmp_is_forbidden(agent: FakeAgent, start: Start) -> None:
    """As in a container without CAP_SYS_PTRACE."""
    victim = start("offline", arguments=("no-kcmp",))
    link = agent.accept()
    link.welcome(OFFLINE)
    victim.line()
    victim.tell("fork")  # the child inherits the filter, so its helper has to do without kcmp
    second = agent.accept()
    second.welcome(OFFLINE)
    victim.line()
    victim.tell("")
    assert victim.line() == "status 0"
    helper = victim.helper()
    victim.tell("exec")  # and so does what it becomes
    third = agent.accept()
    link.close()
    third.welcome(OFFLINE)
    assert victim.line() == f"ready {victim.pid}"
    wait_until(lambda: state(helper) in ("", "Z"), "the old helper has ended")
    helper = victim.helper()
    victim.tell("exec")
    fourth = agent.accept()
    third.close()
    fourth.welcome(OFFLINE)
    assert victim.line() == f"ready {victim.pid}"
    wait_until(lambda: state(helper) in ("", "Z"), "the helper without kcmp has ended")
    assert not victim.is_stopped()
    assert victim.ask("state").startswith("state role 2 connected 1")


def test_the_helper_dies_with_its_process(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    link = agent.accept()
    link.welcome(OFFLINE)
    victim.line()
    helper = victim.helper()
    os.kill(victim.pid, 9)
    link.expect_end()
    wait_until(lambda: state(helper) in ("", "Z"), "the helper has ended")
