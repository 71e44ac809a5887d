# SPDX-License-Identifier: Apache-2.0
"""Each route forced: it stops and resumes, says why it was taken, or says why it cannot be had."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from gpu_node import NewNode, advances, busy, comes_to_stand, idle, stands

import fakenv
from valve_cli.bench.rig import RigError, wait_for

ROOT = Path(__file__).resolve().parents[3]
GRAPH = """
import ctypes as c_
g, node_, ge, f = c_.c_void_p(), c_.c_void_p(), c_.c_void_p(), c_.c_void_p()
cu("cuGraphCreate", c_.byref(g), 0)
cu("cuModuleGetFunction", c_.byref(f), cu.module, b"timer_writer")
class Node(c_.Structure):
    _fields_ = [("f", c_.c_void_p), ("dims", c_.c_uint * 6), ("shared", c_.c_uint),
                ("params", c_.c_void_p), ("extra", c_.c_void_p), ("kernel", c_.c_void_p),
                ("context", c_.c_void_p)]
values = [c_.c_uint64(out), c_.c_uint64(5000)]
params = (c_.c_void_p * 2)(*[c_.addressof(v) for v in values])
cu("cuGraphAddKernelNode_v2", c_.byref(node_), g, None, 0,
   c_.byref(Node(f, (c_.c_uint * 6)(*[1] * 6), 0, c_.addressof(params))))
cu("cuGraphInstantiateWithFlags", c_.byref(ge), g, 0)
"""
LOOP = """
import threading
done = []
def loop():
    cu("cuCtxSetCurrent", ctx)
    while not done:
        %s
        cu.synchronize()
ctx = ctypes.c_void_p(); cu("cuCtxGetCurrent", ctypes.byref(ctx))
thread = threading.Thread(target=loop); thread.start()
"""


@pytest.mark.parametrize(
    ("route", "options"),
    [("agent", {}), ("in-process", {}), ("patched", {"validate": "patched"})],
    ids=["agent", "in-process", "patched"],
)
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_forced_route(new_node: NewNode, route: str, options: dict[str, str], stopped: bool) -> None:
    if route == "patched" and os.geteuid() != 0:
        pytest.skip("the patched driver lets only CAP_SYS_ADMIN pass: run as root")
    node = new_node(route=route, knobs=options)
    victim = node.victim()
    engine = node.engine()
    if stopped:
        victim.process.send_signal(signal.SIGSTOP)  # its launcher
        os.kill(node.pid_of("victim"), signal.SIGSTOP)
    busy(engine)
    wait_for("the channels to be disabled", lambda: all(c["disabled"] for c in node.channels()))
    assert [c["state"] for c in node.channels()].count("parked") == 1, "in the middle of its kernel"
    if stopped:
        victim.process.send_signal(signal.SIGCONT)
        os.kill(node.pid_of("victim"), signal.SIGCONT)
    assert stands(victim)
    idle(engine)
    assert advances(victim)
    said = node.agent.wait_event("route")
    assert (said["route"], said["tenant"]) == (route, "victim")
    status = node.agent.status()
    assert status["route"]["route"] == route
    assert status["route"]["wanted"] == route
    assert "the driver lets channels be disabled" in status["route"]["why"]
    (process,) = status["tenants"]["victim"]["processes"]
    assert (process["route"]["route"], process["route"]["channels"]) == (route, 10)


@pytest.mark.parametrize("launch", ["kernel", "graph"])
def test_launch_gate_holds_kernels_and_graphs(new_node: NewNode, launch: str) -> None:
    node = new_node(route="launch-gate")
    victim = node.victim(launch=False)
    victim.run(GRAPH)
    call = "cu.launch('timer_writer', out, 5000)" if launch == "kernel" else "cu('cuGraphLaunch', ge, 0)"
    victim.run(LOOP % call)
    assert advances(victim)
    engine = node.engine()
    busy(engine)
    assert comes_to_stand(victim)
    node.agent.wait_event("pause")
    assert stands(victim, 0.2), "no launch while online is busy"
    assert not any(c["disabled"] for c in node.channels(None)), "no channel is touched"
    idle(engine)
    assert advances(victim)
    victim.run("done.append(1); thread.join()")


def test_launch_gate_waits_for_what_was_launched(new_node: NewNode) -> None:
    node = new_node(route="launch-gate", pause_timeout="20s")
    victim = node.victim(launch=False)
    victim.run("for i in range(10): cu.launch('timer_writer', out + 16 * i, 100000)")
    engine = node.engine()
    busy(engine)
    said = node.agent.wait_event("pause_timeout")
    assert "still runs (route launch-gate waits for its end)" in said["why"]
    node.agent.wait_event("pause", timeout_s=30)
    assert all(victim.run("result = [cu.read64(out + 16 * i + 8) for i in range(10)]")), (
        "all ran to their end"
    )
    assert not any(c["state"] == "running" for c in node.channels(None))


@pytest.mark.parametrize(
    ("what", "evict", "commit"),
    [
        ("DISABLE evicts", "disable", "none"),
        ("siblings keep a group on the GPU: all channels are listed", "siblings", "none"),
        ("DISABLE masks and PREEMPT commits", "commit", "preempt"),
        ("DISABLE masks and RESTART_RUNLIST commits", "commit", "restart"),
    ],
)
def test_whatever_it_takes_to_evict(new_node: NewNode, what: str, evict: str, commit: str) -> None:
    if commit == "restart" and os.geteuid() != 0:
        pytest.skip("RESTART_RUNLIST needs CAP_SYS_NICE: run as root")
    node = new_node(route="agent", knobs={"evict": evict}, arguments=("--gpu-commit", commit))
    victim = node.victim()
    busy(node.engine())
    assert comes_to_stand(victim), what
    assert node.agent.status()["route"]["commit"] == commit


def test_a_commit_that_is_missing_would_be_seen(new_node: NewNode) -> None:
    """The test above has power: without the step the kernel goes on."""
    node = new_node(route="agent", knobs={"evict": "commit"})
    victim = node.victim()
    busy(node.engine())
    node.agent.wait_event("pause")
    assert not stands(victim, 0.2)


def test_many_channels_go_in_batches(new_node: NewNode) -> None:
    node = new_node(route="agent")
    victim = node.victim()
    victim.run("""
        c = rm.Client(); t = c.tree(channels=150)
    """)
    assert len(node.channels()) == 158
    busy(node.engine())
    wait_for("all channels to be disabled", lambda: all(c["disabled"] for c in node.channels()))
    assert stands(victim)


@pytest.mark.parametrize(
    ("what", "machine", "route", "sentences"),
    [
        ("no driver", {"no_driver": True}, "auto", ["NVML does not start", "valve doctor"]),
        ("stock driver, patched wanted", {}, "patched", ["spec.compute.route is patched", "INVALID_CLIENT"]),
        ("unknown driver, agent wanted", {"driver_version": "999.12"}, "agent",
         ["spec.compute.route is agent", "575, 580, 590, 595, not of 999.12", "update Valve"]),
    ],
)  # fmt: skip
def test_an_agent_that_cannot_control_does_not_start(
    new_node: NewNode, what: str, machine: dict[str, object], route: str, sentences: list[str]
) -> None:
    with pytest.raises(RigError) as caught:
        new_node(machine=machine, route=route)
    for sentence in sentences:
        assert sentence in str(caught.value), what
    assert "ended with 2" in str(caught.value)


def test_an_unknown_driver_gets_the_launch_gate_and_is_told_so(new_machine: fakenv.NewMachine) -> None:
    """The routes say so; the agent itself does not start, because it would not know how to move memory."""
    route = (
        new_machine(driver_version="999.12")
        .actor()
        .run(f"""
        import sys; sys.path.insert(0, {str(ROOT / "node_agent")!r})
        from valve_agent.devices.nvidia import probe
        result = probe.choose().document()
    """)
    )
    assert (route["route"], route["allowed"], route["branch"]) == ("launch-gate", ["launch-gate"], None)
    assert "not of 999.12" in route["refused"]["agent"]
    assert "runs to its end" in route["why"]


def test_an_agent_does_not_start_on_an_unknown_driver(new_node: NewNode) -> None:
    with pytest.raises(RigError, match=r"999\.12 .*(update Valve|install)"):
        new_node(machine={"driver_version": "999.12"})
