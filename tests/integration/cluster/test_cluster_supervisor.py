# SPDX-License-Identifier: Apache-2.0
"""Nothing of a cluster outlives the test that started it.

Aspects: SIGKILL of the test, with and without namespaces; daemons that detached themselves; removal of
state and cgroups; programs that end too early or cannot be started. Gap: a SIGKILL of the janitor itself,
which leaves the state folder behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from e2e.cluster.errors import ClusterError, StartError
from e2e.cluster.processes import Supervisor

ROOT = Path(__file__).resolve().parents[3]
DETACH = "import os, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(600)"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

TEST_THAT_DIES = """
import sys, time
from pathlib import Path
from e2e.cluster.processes import Supervisor
state = Path(sys.argv[1])
supervisor = Supervisor(state / "logs", remove=state, isolate=sys.argv[2] == "isolated", cgroup=sys.argv[3])
supervisor.start("sleeper", ["sleep", "600"])
supervisor.start("daemon", [sys.executable, "-c", sys.argv[4]]).wait(10)
print(supervisor.pid, flush=True)
time.sleep(600)
"""


def gone(processes: list[psutil.Process], timeout_s: float = 15) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return not alive


def until(ready: object, timeout_s: float = 15) -> bool:
    assert callable(ready)
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("mode", [pytest.param("isolated", marks=needs_root), "plain"])
def test_a_killed_test_leaves_nothing(tmp_path: Path, mode: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    cgroup = f"valve-test-{os.getpid()}" if mode == "isolated" else ""
    tops = [top / cgroup for top in Path("/sys/fs/cgroup").iterdir() if top.is_dir()] if cgroup else []
    test = subprocess.Popen(
        [sys.executable, "-c", TEST_THAT_DIES, str(state), mode, cgroup, DETACH],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert test.stdout
    init = psutil.Process(int(test.stdout.readline()))
    owned = [init, *init.parents()[:1], *init.children(recursive=True)]
    assert sum(process.name() == "sleep" for process in owned) == 1
    assert len(owned) >= 4, "the detached daemon came back to init"
    for top in tops:
        (top / "pod").mkdir(parents=True)
    test.send_signal(signal.SIGKILL)
    test.wait()
    test.stdout.close()
    assert gone(owned)
    assert until(lambda: not state.exists())
    assert not [top for top in tops if top.exists()]


def test_close_ends_everything_and_the_log_stays(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "logs")
    program = supervisor.start("talker", ["sh", "-c", "echo started; exec sleep 600"])
    owned = psutil.Process(supervisor.pid).children()
    program.until("it spoke", lambda: "started" in program.log.read_text(), 10)
    supervisor.close()
    assert gone(owned)
    assert program.log.read_text() == "started\n"


def test_a_program_that_ends_early_is_reported_with_its_log(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "logs")
    program = supervisor.start("broken", ["sh", "-c", "echo the reason; exit 3"])
    with pytest.raises(StartError, match=r"broken ended with 3 before it was ready:\nthe reason"):
        program.until("it was ready", lambda: False, 10)
    supervisor.close()


def test_a_program_that_does_not_exist_says_so(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "logs")
    with pytest.raises(ClusterError, match=r"No such file or directory: '/no/such'"):
        supervisor.run(["/no/such"])
    supervisor.close()


def test_programs_see_nothing_of_the_tests_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/somewhere")
    supervisor = Supervisor(tmp_path / "logs")
    assert sorted(line.split("=")[0] for line in supervisor.run(["env"]).split()) == ["HOME", "PATH"]
    supervisor.close()


@needs_root
def test_isolated_programs_have_their_own_network_and_processes(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    supervisor = Supervisor(tmp_path / "logs", isolate=True, binds=[(tmp_path / "lib", "/var/lib")])
    supervisor.run(["touch", "/var/lib/marker"])
    assert (tmp_path / "lib" / "marker").exists()
    assert not Path("/var/lib/marker").exists()
    assert "eth0" not in supervisor.run(["cat", "/proc/net/dev"])
    assert "supervisor.py" in supervisor.run(["cat", "/proc/1/cmdline"])
    supervisor.close()
