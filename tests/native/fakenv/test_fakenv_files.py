# SPDX-License-Identifier: Apache-2.0
"""Who may speak for a client: the open file decides, whoever holds it; and what ends with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from fakenv import Actor, FakeNvError, Machine

INVALID_CLIENT, NO_PERMISSION = 0x23, 0x1B
UNPRIVILEGED = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")


def eventually(what: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Polls: last closes are noticed by another thread."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def owner(machine: Machine) -> Actor:
    """A process with a client, a group and two channels."""
    actor = machine.actor()
    actor.run("import os, rm; c = rm.Client(); t = c.tree()")
    return actor


def agent_of(machine: Machine, owner: Actor) -> Actor:
    """A second process with `h`, the owner's handles, and `fd`, its control file by SCM_RIGHTS."""
    agent = machine.actor()
    known = owner.run("result = {'client': c.handle, **t}; give = [c.fd]")
    agent.run(f"import os, ctypes, rm; h = {known!r}; fd = fds[0]", fds=tuple(owner.fds))
    for fd in owner.fds:
        os.close(fd)
    return agent


PROBE = "result = rm.Client(fd=fd, handle=h['client']).control(h['tsg'], rm.TSG_INFO, bytes(4))[0]"


def test_two_opens_are_two_clients(owner: Actor) -> None:
    assert (
        owner.run("""
        other = rm.Client()
        wrong = rm.Client(fd=other.fd, handle=c.handle)
        result = [other.handle != c.handle, wrong.control(t['tsg'], rm.TSG_INFO, bytes(4))[0],
                  wrong.free(t['tsg']), wrong.alloc(t['device'], rm.SUBDEVICE, bytes(4))[0],
                  wrong.disable(t['subdevice'], t['channels']),
                  other.disable(other.tree()['subdevice'], t['channels'], client=c.handle)]
    """)
        == [True] + [INVALID_CLIENT] * 5
    )


def test_a_duplicate_of_the_descriptor_is_the_same_file(owner: Actor) -> None:
    owner.run("fd = os.dup(c.fd); h = {'client': c.handle, **t}")
    assert owner.run(PROBE) == 0


@pytest.mark.parametrize("way", ["own open", "SCM_RIGHTS", "pidfd_getfd"])
def test_another_process_needs_the_same_file(machine: Machine, owner: Actor, way: str) -> None:
    agent = agent_of(machine, owner)
    if way == "own open":
        agent.run("fd = os.open('/dev/nvidiactl', os.O_RDWR)")
    elif way == "pidfd_getfd":
        number = owner.run("result = c.fd")
        agent.run(f"fd = ctypes.CDLL(None).syscall(438, os.pidfd_open({owner.pid}), {number}, 0)")
    assert agent.run(PROBE) == (INVALID_CLIENT if way == "own open" else 0)


def test_it_answers_while_the_owner_is_stopped(machine: Machine, owner: Actor) -> None:
    agent = agent_of(machine, owner)
    owner.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)
    disable = "result = rm.Client(fd=fd, handle=h['client']).disable(h['subdevice'], h['channels'])"
    assert agent.run(disable) == 0
    assert [c["disabled"] for c in machine.status()["channels"]] == [True, True]
    owner.process.send_signal(signal.SIGCONT)
    assert owner.run("result = c.disable(t['subdevice'], t['channels'], on=False)") == 0


def test_children_and_threads_are_under_the_driver_too(owner: Actor) -> None:
    assert owner.run("""
        import subprocess, sys, threading
        seen = []
        def ask(): seen.append(c.control(t['tsg'], rm.TSG_INFO, bytes(4))[0])
        thread = threading.Thread(target=ask); thread.start(); thread.join()
        child = os.fork()
        if child == 0:
            os._exit(c.control(t['tsg'], rm.TSG_INFO, bytes(4))[0])
        seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        run = [sys.executable, "-S", "-c", "import os; os.open('/dev/nvidiactl', os.O_RDWR)"]
        seen.append(subprocess.run(run).returncode)
        result = seen
    """) == [0, 0, 0]


def test_a_static_binary_sees_the_driver(machine: Machine) -> None:
    done = subprocess.run(
        [*machine.prefix(), str(machine.folder / "bench")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "RM_CONTROL" in done.stdout
    alone = subprocess.run(
        [machine.folder / "bench"], capture_output=True, text=True, timeout=60, check=False
    )
    assert alone.returncode == 1
    assert "no driver here" in alone.stderr


def test_the_nodes_look_like_a_drivers(machine: Machine) -> None:
    seen = machine.actor().run("""
        import os, stat
        def look(s): return [stat.S_ISCHR(s.st_mode), os.major(s.st_rdev), os.minor(s.st_rdev)]
        first, second = (os.open("/dev/nvidiactl", os.O_RDWR) for _ in range(2))
        uvm = os.open("/dev/nvidia-uvm", os.O_RDWR)
        result = {
            "fstat": look(os.fstat(first)),
            "stat": [look(os.stat("/dev/nvidia" + n)) for n in ("ctl", "0", "-uvm")],
            "one inode": len({os.fstat(fd).st_ino for fd in (first, second)}) == 1,
            "links": [os.readlink(f"/proc/self/fd/{fd}") for fd in (first, uvm)],
            "there": [os.path.exists(p) for p in ("/dev/nvidia0", "/dev/nvidia1", "/dev/null", "/no/such")],
            "access": [os.access(p, os.R_OK | os.W_OK) for p in ("/dev/nvidia0", "/dev/nvidia1")],
            "others": [stat.S_ISSOCK(os.fstat(s.fileno()).st_mode) for s in [__import__("socket").socket()]],
        }
    """)
    assert seen == {
        "fstat": [True, 195, 255],
        "stat": [[True, 195, 255], [True, 195, 0], [True, 511, 0]],
        "one inode": True,
        "links": ["/dev/nvidiactl", "/dev/nvidia-uvm"],
        "there": [True, False, True, False],
        "access": [True, False],
        "others": [True],
    }


def test_another_process_sees_the_links_too(machine: Machine, owner: Actor) -> None:
    number = owner.run("result = c.fd")
    links = machine.actor().run(f"import os; result = os.readlink('/proc/{owner.pid}/fd/{number}')")
    assert links == "/dev/nvidiactl"


def test_the_client_lives_as_long_as_any_descriptor(machine: Machine, owner: Actor) -> None:
    owner.run("give = [c.fd]")
    kept = owner.fds[0]
    owner.close()
    time.sleep(0.05)
    assert len(machine.status()["clients"]) == 1, "a passed descriptor keeps the dead process's client"
    os.close(kept)
    assert eventually(lambda: not machine.status()["clients"] and not machine.status()["channels"])


def test_killing_the_owner_frees_everything(machine: Machine, owner: Actor) -> None:
    assert len(machine.status()["channels"]) == 2
    owner.close()
    assert eventually(lambda: not machine.status()["clients"] and not machine.status()["files"])


#                 control                    arguments                  root  nobody
PRIVILEGES = [
    ("RESTART_RUNLIST", "0xA06F0111, bytes(2)", "channel", 0, NO_PERMISSION),
    ("SET_INTERLEAVE_LEVEL", "0xA06C0107, bytes(4)", "tsg", 0, NO_PERMISSION),
    ("MAKE_REALTIME", "0xA06C0110, bytes(1)", "tsg", 0, NO_PERMISSION),
    ("RUNLIST_SET_SCHED_POLICY", "0x20801115, bytes(8)", "subdevice", 0, NO_PERMISSION),
    ("STOP_RUNLIST", "0x801711, bytes(4)", "device", 0x56, NO_PERMISSION),
    ("PREEMPT", "0xA06C0105, bytes(8)", "tsg", 0, 0),
    ("SET_TIMESLICE", "0xA06C0103, bytes(8)", "tsg", 0, 0),
    (
        "GET_CTXSW_MODES",
        "0x20801235, __import__('struct').pack('I', t['channels'][0]) + bytes(20)",
        "subdevice",
        0,
        0,
    ),
]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to drop privileges from")


@root_only
@pytest.mark.parametrize("as_root", [True, False], ids=["root", "nobody"])
def test_privileges_are_the_callers(machine: Machine, as_root: bool) -> None:
    actor = machine.actor(*(() if as_root else UNPRIVILEGED))
    actor.run("import rm; c = rm.Client(); t = c.tree(); t['channel'] = t['channels'][0]")
    assert actor.run("result = c.disable(t['subdevice'], t['channels'])") == 0
    for name, arguments, on, root, nobody in PRIVILEGES:
        got = actor.run(f"result = c.control(t['{on}'], {arguments})[0]")
        assert got == (root if as_root else nobody), name


@root_only
def test_a_root_agent_brings_its_own_privilege_to_a_passed_file(machine: Machine) -> None:
    owner = machine.actor(*UNPRIVILEGED)
    owner.run("import rm; c = rm.Client(); t = c.tree()")
    agent = agent_of(machine, owner)
    agent.run("c = rm.Client(fd=fd, handle=h['client']); t = h")
    restart = "result = c.control(t['channels'][0], rm.RESTART_RUNLIST, bytes(2))[0]"
    assert agent.run(restart) == 0
    assert owner.run(restart) == NO_PERMISSION


@root_only
@pytest.mark.parametrize(
    ("validate", "prefix", "expected"),
    [
        pytest.param("strict", (), INVALID_CLIENT, id="stock driver, root, own file"),
        pytest.param("patched", (), 0, id="patched driver, root, own file"),
        pytest.param("patched", UNPRIVILEGED, INVALID_CLIENT, id="patched driver, nobody, own file"),
    ],
)
def test_the_patched_driver(
    machine: Machine, owner: Actor, validate: str, prefix: tuple[str, ...], expected: int
) -> None:
    machine.ctl("validate", validate)
    agent = machine.actor(*prefix)
    known = owner.run("result = {'client': c.handle, **t}")
    agent.run(f"import os, rm; h = {known!r}; fd = os.open('/dev/nvidiactl', os.O_RDWR)")
    assert agent.run(PROBE) == expected


def test_groups_can_be_shared_and_channels_cannot(machine: Machine, owner: Actor) -> None:
    peer = machine.actor()
    known = owner.run("result = {'client': c.handle, **t}")
    peer.run(f"import rm; h = {known!r}; c = rm.Client(); t = c.tree()")
    dup = "result = c.dup(t['device'], h['client'], h['{}'])"
    assert peer.run(dup.format("tsg"))[0] == NO_PERMISSION
    assert owner.run(f"result = c.share(t['tsg'], {peer.run('result = c.handle')})") == 0
    status, copy = peer.run(dup.format("tsg"))
    assert status == 0
    assert peer.run(f"result = c.preempt({copy})") == 0
    assert owner.run("result = c.dup(t['device'], c.handle, t['channels'][0])[0]") == 0x1F


def test_an_unknown_word_is_refused(machine: Machine) -> None:
    with pytest.raises(FakeNvError, match="not understood"):
        machine.ctl("explode")
    done = subprocess.run(
        [machine.folder / "fakenv", "ctl", "--socket", machine.socket, "status"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert json.loads(done.stdout)["branch"] == "580"


def test_run_gives_back_the_exit_status(machine: Machine) -> None:
    for code in ("raise SystemExit(7)", "import os; os.kill(os.getpid(), 9)"):
        command = [str(machine.folder / "fakenv"), "run", "--", sys.executable, "-S", "-c", code]
        done = subprocess.run(command, timeout=30, check=False)
        assert done.returncode == (7 if "Exit" in code else 128 + 9)
