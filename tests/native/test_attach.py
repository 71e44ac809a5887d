# SPDX-License-Identifier: Apache-2.0
"""How a process becomes a tenant, and how it is refused."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_agent import FakeAgent
from victims import Victim, children, compile_program, state, wait_until

from valve_agent import wire

Start = Callable[..., Victim]
ONLINE, OFFLINE = wire.Role.ONLINE, wire.Role.OFFLINE


def test_offline_is_let_in_before_it_runs(agent: FakeAgent, start: Start, variant: str) -> None:
    victim = start("offline", variant)
    link = agent.accept()
    assert victim.silent_for(0.3), "it ran before WELCOME"
    hello = link.welcome(OFFLINE)
    assert victim.line() == f"ready {victim.pid}"
    assert link.peer_pid == victim.helper()
    assert hello.main_pid == victim.pid
    assert hello.role_claimed == OFFLINE
    assert hello.flags == wire.HelloFlag.HELPER | wire.HelloFlag.BARRIER
    assert hello.arena_slabs == 0
    assert hello.comm.startswith(b"victim-")
    assert victim.ask("state") == "state role 2 connected 1 error "
    assert victim.end() == 0
    link.expect_end()


def test_online_runs_at_once_and_connects_when_it_uses_the_api(
    agent: FakeAgent, start: Start, variant: str
) -> None:
    victim = start("online", variant)
    assert victim.line() == f"ready {victim.pid}"
    assert victim.ask("state").startswith("state role 1 connected 0")
    link = agent.accept()
    hello = link.welcome(ONLINE, agent.doorbell)
    assert link.peer_pid == victim.pid
    assert hello.flags == 0
    assert victim.ask("attach 20000") == "attach 1"
    assert victim.end() == 0


def test_without_a_socket_the_library_does_nothing(library: Path, victim_of: Callable[[str], Path]) -> None:
    done = subprocess.run(
        [victim_of("plain")],
        input="state\nopen 1 1\nbusy\nevents\nwant 1 0\nfds\n",
        text=True,
        capture_output=True,
        env={**os.environ, "LD_PRELOAD": str(library), "VALVE_WORKLOAD": "offline"},
        timeout=20,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == [
        "state role 0 connected 0 error ",
        "denied this process is no tenant: start it with `valve run`",
        "ok",
        "events",
        "want -1",
        "fds 0 1 2",
    ]


@pytest.mark.parametrize("is_tenant", [False, True])
def test_a_constructor_may_wait_for_a_thread_that_works_on_files(
    agent: FakeAgent, library: Path, tmp_path: Path, is_tenant: bool
) -> None:
    source = Path(__file__).with_name("joins.c")
    loaded = compile_program(tmp_path / "libjoins.so", source, "-DLIBRARY", "-shared")
    program = compile_program(tmp_path / "joins", source, "-ldl")
    environment = {**os.environ, "LD_PRELOAD": str(library), "VALVE_WORKLOAD": "offline"}
    if is_tenant:
        environment["VALVE_SOCKET"] = str(agent.path)
    with subprocess.Popen([program, loaded], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            if is_tenant:
                agent.accept().welcome(OFFLINE)
            assert process.communicate(timeout=20)[0] == "loaded\n"
        finally:
            process.kill()


def test_offline_waits_for_an_agent_and_says_so(agent: FakeAgent, start: Start, variant: str) -> None:
    agent.close()
    victim = start("offline", variant)
    victim.wait_said("no agent answers at")
    assert victim.silent_for(0.5), "it ran without an agent"
    assert victim.stderr().count("no agent answers") == 1
    agent.listen()
    agent.accept().welcome(OFFLINE)
    assert victim.line().startswith("ready")
    assert "connected to the agent" in victim.stderr()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (wire.RejectCode.EROLE, "the tenant is online: start it with `valve run --role online`"),
        (wire.RejectCode.EVERSION, "this agent speaks versions 7..9: install the same Valve on both sides"),
        (wire.RejectCode.EPROTO, "HELLO is malformed"),
    ],
)
def test_a_final_refusal_ends_offline_with_the_sentence(
    agent: FakeAgent, start: Start, variant: str, code: wire.RejectCode, sentence: str
) -> None:
    victim = start("offline", variant)
    link = agent.accept()
    link.expect(wire.Hello)
    link.send(wire.Reject(code=code, text=sentence.encode()))
    assert victim.process.wait(20) == 78
    assert victim.stderr() == f"valve: the agent refuses this offline process: {sentence}\n"
    assert victim.silent_for(0), "user code ran"


def test_an_unknown_tenant_is_tried_again(agent: FakeAgent, start: Start, variant: str) -> None:
    """An agent that has just restarted hears of the tenant from its launcher a moment later."""
    victim = start("offline", variant)
    for _ in range(2):
        link = agent.accept()
        link.expect(wire.Hello)
        link.send(wire.Reject(code=wire.RejectCode.EIDENTITY, text=b"who are you?"))
        link.expect_end()
    agent.accept().welcome(OFFLINE)
    assert victim.line().startswith("ready")
    assert victim.stderr() == ""


def test_a_tenant_that_stays_unknown_is_refused(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    rejections = 0
    while victim.process.poll() is None:
        with contextlib.suppress(TimeoutError):
            link = agent.accept(timeout_s=0.2)
            link.expect(wire.Hello)
            link.send(wire.Reject(code=wire.RejectCode.EIDENTITY, text=b"no tenant: use `valve run`"))
            link.expect_end()
            rejections += 1
    assert victim.process.returncode == 78
    assert rejections > 10
    assert victim.stderr() == "valve: the agent refuses this offline process: no tenant: use `valve run`\n"


def test_online_goes_on_when_refused(agent: FakeAgent, start: Start, variant: str) -> None:
    victim = start("online", variant)
    victim.line()
    victim.ask("busy")
    link = agent.accept()
    link.expect(wire.Hello)
    link.send(wire.Reject(code=wire.RejectCode.EROLE, text=b"you are offline"))
    victim.wait_said("valve: the agent refuses this process: you are offline")
    assert victim.ask("state") == "state role 1 connected 0 error you are offline"


@pytest.mark.parametrize(
    ("what", "frame", "sentence"),
    [
        (
            "another role",
            wire.Welcome(role=1, device=1, slab_bytes=4096, lease_ms=100),
            "does not fit this process",
        ),
        ("no device", wire.Welcome(role=2, device=0, slab_bytes=4096, lease_ms=100), "impossible value"),
        ("no lease", wire.Welcome(role=2, device=1, slab_bytes=4096, lease_ms=0), "impossible value"),
    ],
)
def test_a_wrong_welcome_lets_nothing_in(
    agent: FakeAgent, start: Start, what: str, frame: wire.Welcome, sentence: str
) -> None:
    victim = start("offline")
    link = agent.accept()
    link.expect(wire.Hello)
    link.send(frame, [link.page_fd])
    link.expect_end()
    victim.wait_said(sentence)
    assert victim.silent_for(0.2), "user code ran"


def test_an_agent_of_another_version_is_named_as_such(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    link = agent.accept()
    link.expect(wire.Hello)
    frame = wire.Welcome(role=2, device=1, slab_bytes=4096, lease_ms=100)
    frame.header.version = 9
    link.send(frame, [link.page_fd])
    victim.wait_said("speaks another version of the protocol: update Valve")
    assert victim.silent_for(0.2), "user code ran"


@pytest.mark.parametrize(("value", "shown"), [("sometimes", "sometimes"), ("", "")])
def test_a_workload_that_is_neither_is_refused(start: Start, value: str, shown: str) -> None:
    victim = start(value)
    assert victim.process.wait(20) == 78
    assert victim.stderr() == f"valve: VALVE_WORKLOAD must be online or offline; it is {shown}\n"


def test_the_helper_leaves_no_trace_in_its_process(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    agent.accept().welcome(OFFLINE)
    victim.line()
    assert victim.ask("fds") == "fds 0 1 2", "descriptors of libvalve in an offline process"
    assert victim.ask("wait") == "wait -1 No child processes", "the helper is seen by wait()"
    helper = victim.helper()
    status = Path(f"/proc/{helper}/status").read_text()
    assert "SigBlk:\tfffffffffffbfeff" in status, "it blocks every signal but KILL and STOP"
    assert os.getpgid(helper) != os.getpgid(victim.pid)
    victim.kill()
    wait_until(lambda: state(helper) in ("", "Z"), "the helper ends with its process")


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_sentences_do_not_get_into_the_connection(
    agent: FakeAgent, library: Path, closed: tuple[int, ...]
) -> None:
    """A daemon starts without a stderr: the helper's next descriptors must not get its number."""
    agent.close()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "VALVE_SOCKET": str(agent.path),
        "VALVE_WORKLOAD": "offline",
    }

    def close() -> None:
        for fd in closed:
            os.close(fd)

    with subprocess.Popen(["sleep", "60"], env=environment, preexec_fn=close) as process:
        try:
            wait_until(lambda: children(process.pid) != [], "it has a helper")
            time.sleep(0.3)  # it finds no agent, which it will say once there is one
            agent.listen()
            link = agent.accept()
            link.welcome(OFFLINE)
            link.sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                wire.recv(link.sock)
            (helper,) = children(process.pid)
            assert {os.readlink(f"/proc/{helper}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
        finally:
            process.kill()


def test_online_hears_its_own_requests_after_a_lack_of_descriptors(agent: FakeAgent, start: Start) -> None:
    agent.lease_ms = 60_000  # no other reason to look
    victim = start("online")
    victim.line()
    before = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    assert victim.ask("attach 300") == "attach 0"
    resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, before)
    victim.tell("attach 20000")
    link = agent.accept()
    link.welcome(ONLINE, agent.doorbell)
    assert victim.line() == "attach 1"
    time.sleep(0.2)
    link.sock.settimeout(5)
    victim.tell("open 8388608 20000")
    link.serve_arena().close()
    assert victim.line().startswith("arena 2")


def test_online_keeps_its_descriptors_out_of_the_way(agent: FakeAgent, start: Start) -> None:
    victim = start("online")
    victim.line()
    victim.tell("open 8388608 20000")
    link = agent.accept()
    link.welcome(ONLINE, agent.doorbell)
    link.serve_arena().close()
    victim.line()
    numbers = victim.ask("fds").split()[1:]
    assert numbers[:3] == ["0", "1", "2"]
    assert all(int(number) >= 700 for number in numbers[3:]), "below 700, or '!': not close-on-exec"
    assert len(numbers) > 5


def test_offline_survives_closing_all_descriptors(agent: FakeAgent, start: Start) -> None:
    victim = start("offline")
    link = agent.accept()
    link.welcome(OFFLINE)
    victim.line()
    assert victim.ask("close-all") == "ok 0"
    victim.tell("open 8388608 20000")
    arena = link.serve_arena()
    assert victim.line().startswith("arena 2")
    link.grant({0})
    link.reclaim({0})
    arena.close()


def test_online_survives_closing_all_descriptors(agent: FakeAgent, start: Start) -> None:
    victim = start("online")
    victim.line()
    victim.tell("attach 20000")
    agent.accept().welcome(ONLINE, agent.doorbell)
    assert victim.line() == "attach 1"
    victim.ask("close-all")
    victim.ask("want 1 0")  # its control thread wakes up and finds out
    link = agent.accept()
    link.welcome(ONLINE, agent.doorbell)
    wait_until(lambda: "connected 1" in victim.ask("state"), "it is connected again")
    agent.rings()
    victim.ask("busy")
    wait_until(lambda: link.page.busy and agent.rings() > 0, "busy arrives by the new doorbell")


def test_a_process_without_its_leader_is_served(agent: FakeAgent, start: Start) -> None:
    victim = start("offline", arguments=("leaderless",))
    link = agent.accept()
    link.welcome(OFFLINE)
    assert victim.line() == f"ready {victim.pid}"
    wait_until(lambda: state(victim.pid) == "Z", "the leader is gone")
    victim.tell("open 8388608 20000")
    link.serve_arena().close()
    assert victim.line().startswith("arena 2")


def test_python_processes_and_their_children_attach(
    agent: FakeAgent, library: Path, bundle: Path, tmp_path: Path
) -> None:
    """A subprocess of an offline process is a process of its own, through vfork and exec."""
    code = "import subprocess, sys; sys.exit(subprocess.run(['true']).returncode)"
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "VALVE_SOCKET": str(agent.path),
        "VALVE_WORKLOAD": "offline",
    }
    with subprocess.Popen([sys.executable, "-S", "-c", code], env=environment) as process:
        first = agent.accept()
        hello = first.welcome(OFFLINE)
        assert hello.main_pid == process.pid
        second = agent.accept()
        child = second.expect(wire.Hello)
        assert child.main_pid in children(process.pid)
        second.start_heart()
        second.send(
            wire.Welcome(role=2, device=1, slab_bytes=4096, slabs_limit=1, lease_ms=400), [second.page_fd]
        )
        assert process.wait(20) == 0
