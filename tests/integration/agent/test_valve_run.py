# SPDX-License-Identifier: Apache-2.0
"""`valve run`: a launcher that the command does not notice, and the agent can rely on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import POLICY

from valve_agent.identity import children_of
from valve_cli.bench.rig import LiveAgent, valve_run, wait_for

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(runtime: Path) -> Iterator[Launch]:
    """launch(socket, "online", [command], *options): a running `valve run` with its output in pipes."""
    with contextlib.ExitStack() as stack:

        def begin(
            path: Path,
            workload: str,
            command: list[str],
            *options: str,
            environment: dict[str, str] | None = None,
        ) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                valve_run(path, runtime, workload, "", command, options),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(end, process)
            return process

        yield begin


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        for child in children_of(process.pid):
            os.kill(child, signal.SIGKILL)
        process.terminate()
        process.wait(20)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=40)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("what", "command", "status"),
    [
        ("success", ["true"], 0),
        ("the command's own status", ["sh", "-c", "exit 7"], 7),
        ("a signal", ["sh", "-c", "kill -9 $$"], 128 + 9),
        ("no such command", ["/no/such/command"], 127),
        ("no right to execute", ["/etc/passwd"], 126),
    ],
)
def test_exit_status(agent: LiveAgent, launch: Launch, what: str, command: list[str], status: int) -> None:
    assert finish(launch(agent.socket, "online", command))[0] == status


def test_the_environment_of_the_command(agent: LiveAgent, launch: Launch, runtime: Path) -> None:
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    environment = {**os.environ, "LD_PRELOAD": "libm.so.6", "PYTHONPATH": "/somewhere"}
    status, out, err = finish(
        launch(agent.socket, "online", [sys.executable, "-c", show], environment=environment)
    )
    assert status == 0, err
    found = json.loads(out)
    assert found["LD_PRELOAD"].split()[0] == "libm.so.6"
    assert Path(found["LD_PRELOAD"].split()[1]).parent == runtime / "lib"
    assert found["PYTHONPATH"].split(os.pathsep) == [str(runtime / "python"), "/somewhere"]
    assert (found["VALVE_WORKLOAD"], found["VALVE_SOCKET"]) == ("online", str(agent.socket))


def test_signals_reach_the_command(agent: LiveAgent, launch: Launch) -> None:
    script = "trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    process = launch(agent.socket, "online", ["sh", "-c", script])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    status, out, _ = finish(process)
    assert (status, out) == (3, "got it\n")


def test_online_starts_without_an_agent_and_registers_later(tmp_path: Path, launch: Launch) -> None:
    process = launch(tmp_path / "agent.sock", "online", ["sh", "-c", "echo started; sleep 1000"])
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    with LiveAgent(tmp_path, POLICY) as agent:
        wait_for("the launcher to register", lambda: agent.status()["tenants"])
        assert agent.status()["tenants"]["sh"]["role"] == "online"


def test_offline_waits_for_an_agent(tmp_path: Path, launch: Launch) -> None:
    process = launch(tmp_path / "agent.sock", "offline", ["echo", "started"])
    assert process.stderr is not None
    assert "waiting for an agent" in process.stderr.readline()
    time.sleep(0.3)
    assert process.poll() is None
    assert children_of(process.pid) == []
    with LiveAgent(tmp_path, POLICY):
        status, out, _ = finish(process)
    assert (status, out) == (0, "started\n")


def test_orphans_stay_the_tenants_and_end_with_the_command(
    agent: LiveAgent, launch: Launch, tmp_path: Path
) -> None:
    """A daemon that forked twice is adopted by the launcher, so the agent can still tell whose it is."""
    pid_file = tmp_path / "pid"
    daemon = f"(setsid sh -c 'echo $$ > {pid_file}; exec sleep 1000' >/dev/null 2>&1 &); sleep 0.5"
    process = launch(agent.socket, "online", ["sh", "-c", daemon + "; sleep 1000"])
    pid = int(wait_for("the daemon", lambda: pid_file.exists() and pid_file.read_text().strip()))
    wait_for("it to be adopted", lambda: pid in children_of(process.pid))
    process.terminate()
    assert finish(process)[0] == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_offline_command_dies_with_its_launcher(agent: LiveAgent, launch: Launch) -> None:
    """Nobody would vouch for it any more."""
    process = launch(agent.socket, "offline", ["sleep", "1000"])
    (child,) = wait_for("the command", lambda: children_of(process.pid))
    process.kill()
    process.wait()
    wait_for("the command to be gone", lambda: not Path(f"/proc/{child}").exists())
    wait_for("the tenant to be gone", lambda: agent.status()["tenants"] == {})


@pytest.mark.parametrize(
    ("what", "arguments", "sentence"),
    [
        ("no workload", ["--", "true"], "--workload"),
        ("no command", ["--workload", "online"], "no command"),
        ("a bad size", ["--workload", "offline", "--memory", "1 GB", "--", "true"], "--memory 1 GB"),
        ("a limit for online", ["--workload", "online", "--memory", "1Gi", "--", "true"], "leave it out"),
        ("no library", ["--workload", "online", "--runtime", "/nowhere", "--", "true"], "make runtime"),
    ],
)
def test_bad_arguments_get_a_sentence(what: str, arguments: list[str], sentence: str, runtime: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "valve_cli.main", "run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (2, 125)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
