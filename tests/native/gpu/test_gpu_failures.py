# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on a node with a GPU, injected: the outcome, and the sentence that the operator reads."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from gpu_node import LONG_US, VICTIM, NewNode, Node, advances, busy, comes_to_stand, idle, stands
from victims import children, state

from valve_cli.bench.rig import wait_for
from valve_cli.status import as_text

DENY = ("deny", "control", "0x2080110b", "0x1b")


def is_gone(pid: int) -> bool:
    return state(pid) in ("", "Z")


def test_permission_denied_takes_the_next_route_and_says_why(node: Node) -> None:
    victim = node.victim(launch=False)
    victim.run("cu.launch('nop'); cu.synchronize()")
    node.machine.ctl(*DENY)
    busy(node.engine())
    node.agent.wait_event("pause")
    said = wait_for(
        "the fallback", lambda: [e for e in node.agent.events("route") if e["route"] == "launch-gate"]
    )
    assert "a privilege is missing" in said[0]["why"]
    assert "run the agent as root" in said[0]["why"]
    status = node.agent.status()
    (process,) = status["tenants"]["victim"]["processes"]
    assert process["route"]["route"] == "launch-gate"
    text = as_text(status)
    assert "route agent: the driver lets channels be disabled" in text
    assert f"process {process['pid']} by route launch-gate: route" in text


def test_permission_denied_on_a_forced_route_ends_the_process(new_node: NewNode) -> None:
    """P6: what cannot be paused does not share the GPU."""
    node = new_node(route="agent", pause_timeout="300ms")
    victim = node.victim()
    pid = node.pid_of("victim")
    node.machine.ctl(*DENY)
    busy(node.engine())
    killed = node.agent.wait_event("kill")
    assert killed["pid"] == pid
    assert "could not be paused for" in killed["why"]
    assert "must not share the device" in killed["why"]
    assert "a privilege is missing" in node.agent.wait_event("pause_timeout")["why"]
    wait_for("the victim's end", lambda: is_gone(pid))
    wait_for("its channels to go", lambda: node.channels(None) == [])
    assert victim.process.wait(20) != 0


def test_a_process_that_cannot_be_controlled_while_open_is_ended_too(new_node: NewNode) -> None:
    node = new_node(route="agent", pause_timeout="300ms")
    node.machine.ctl(*DENY)
    actor = node.tenant("offline", "victim")
    actor.start(VICTIM)
    killed = node.agent.wait_event("kill")
    assert "a privilege is missing" in killed["why"]


def test_a_slow_driver_delays_the_pause_and_is_named(new_node: NewNode) -> None:
    node = new_node(route="agent", pause_timeout="20s")
    victim = node.victim()
    engine = node.engine()
    assert advances(victim)
    node.machine.ctl("hold", 5000)
    busy(engine)
    slow = node.agent.wait_event("slow_driver")
    assert slow["took_ms"] > 100
    assert slow["pids"] == [node.pid_of("victim")]
    assert stands(victim)
    assert node.agent.events("kill") == []
    idle(engine)
    assert advances(victim)


def test_an_xid_is_in_the_log(node: Node) -> None:
    node.machine.ctl("xid", 0, 31)
    said = node.agent.wait_event("xid")
    assert (said["xid"], said["level"]) == (31, "error")
    assert "touched memory that is not mapped" in said["why"]


def test_a_lost_gpu_counts_as_paused_and_is_in_the_log(node: Node) -> None:
    node.victim()
    node.machine.ctl("lost", 0, 1)
    busy(node.engine())
    node.agent.wait_event("pause")
    assert "fallen off the bus" in node.agent.wait_event("xid")["why"]
    assert node.agent.events("kill") == []


@pytest.mark.parametrize("paused", [False, True], ids=["while running", "while paused"])
def test_without_an_agent_offline_stands_until_the_next_one(node: Node, paused: bool) -> None:
    """kill -9: nothing of the agent runs any more. The helper disables the channels, and only an agent that
    has heard of them enables them again."""
    victim = node.victim()
    engine = node.engine()
    if paused:
        busy(engine)
        assert comes_to_stand(victim)
    pid = node.pid_of("victim")
    node.agent.kill()
    wait_for("all channels to be disabled", lambda: all(c["disabled"] for c in node.channels(None)))
    wait_for("the process to be stopped", lambda: state(pid) == "T")
    ctas = sum(c["ctas"] for c in node.channels())
    time.sleep(0.3)
    assert sum(c["ctas"] for c in node.channels()) == ctas, "not one block ran"
    node.agent.start()
    if paused:
        assert stands(victim, 1.0), "awake, for its memory may be asked for, but off the GPU"
        idle(engine)
    assert advances(victim), "the same kernel goes on"
    wait_for("no channel to be disabled", lambda: not any(c["disabled"] for c in node.channels(None)))


def test_a_hung_agent_does_not_keep_offline_running(node: Node) -> None:
    """SIGSTOP of both of its processes: no heartbeat, and after the lease the helper acts by itself."""
    victim = node.victim()
    agent = node.agent.pid
    (gate,) = [pid for pid in children(agent) if b"gate_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in (agent, gate):
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_for("all channels to be disabled", lambda: all(c["disabled"] for c in node.channels(None)))
    finally:
        for pid in (gate, agent):
            os.kill(pid, signal.SIGCONT)
    assert advances(victim), "the agent is back and nobody is busy"


def test_a_process_that_dies_is_closed_at_once(node: Node) -> None:
    before = _used(node)
    victim = node.victim()
    victim.run("p = cu.alloc(64 << 20)")
    engine = node.engine()
    busy(engine)
    assert comes_to_stand(victim)
    os.kill(node.pid_of("victim"), signal.SIGKILL)
    wait_for("its memory and channels to go", lambda: _used(node) == before and node.channels(None) == [])


def _used(node: Node) -> int:
    (used,) = node.machine.status()["used_bytes"]
    return int(used)


def test_a_killed_helper_leaves_the_process_paused(node: Node) -> None:
    """Its connection is gone, so nobody could be told anything: the gate keeps it off."""
    victim = node.victim()
    pid = node.pid_of("victim")
    (helper,) = [p for p in children(pid) if Path(f"/proc/{p}/comm").read_text() == "valve-helper\n"]
    os.kill(helper, signal.SIGKILL)
    node.agent.wait_event("detach")
    assert comes_to_stand(victim)
    assert all(c["disabled"] for c in node.channels())


@pytest.mark.parametrize(
    ("what", "load"),
    [
        ("libcuda in a namespace of its own", "ctypes.CDLL('libcuda.so.1', mode=8 | 2)")
    ],  # RTLD_DEEPBIND | RTLD_NOW
)
def test_a_process_that_evades_the_capture_is_ended(node: Node, what: str, load: str) -> None:
    actor = node.tenant("offline", "victim")
    actor.start(f"""
        import ctypes, time
        {load}
        import driver_api; cu = driver_api.Cuda(); cu.alloc(32 << 20)
        cu.launch('spin_us', {LONG_US}); time.sleep(60)
    """)
    said = node.agent.wait_event("uncontrolled")
    assert "libvalve saw none of its channels" in said["why"], what
    assert "RTLD_DEEPBIND" in said["why"]
    wait_for("its end", lambda: node.channels(None) == [])


@pytest.mark.parametrize("refuse", [False, True], ids=["reported", "refused"])
def test_a_process_of_no_tenant_is_reported_and_refused_by_policy(new_node: NewNode, refuse: bool) -> None:
    node = new_node(unknown="Refuse" if refuse else "Report")
    victim = node.victim()
    stranger = node.machine.actor()
    stranger.run("import driver_api; cu = driver_api.Cuda(); cu.alloc(32 << 20)")
    said = node.agent.wait_event("unknown-process")
    assert (said["pid"], said["killed"]) == (stranger.pid, False)
    assert "belongs to no tenant of it: start it with `valve run`" in said["why"]
    if refuse:
        assert "offline gets no compute" in said["why"]
        assert comes_to_stand(victim)
        time.sleep(1.5)
    assert stands(victim) == refuse
    assert stranger.process.poll() is None, "it is not ours to end"
    assert len(node.agent.events("unknown-process")) == 1, "said once"
    stranger.close()
    assert advances(victim)


def test_an_online_process_is_never_paused(node: Node) -> None:
    online = node.engine()
    online.run("import driver_api; cu = driver_api.Cuda(); cu.alloc(32 << 20); out = cu.host(4096)")
    online.run(VICTIM)
    online.run(f"cu.launch('timer_writer', out, {LONG_US})")
    node.agent.wait_event("resume")
    busy(online)
    node.agent.wait_event("pause")
    assert advances(online)
    assert not any(c["disabled"] for c in node.channels(None))
    time.sleep(3.5)
    assert node.agent.events("unknown-process") == node.agent.events("uncontrolled") == []
