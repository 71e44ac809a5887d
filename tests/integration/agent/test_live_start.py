# SPDX-License-Identifier: Apache-2.0
"""How the agent starts, or says why not; what it costs at rest; what it shows."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from live import POLICY

from valve_agent.sockets import default_path
from valve_cli.bench.rig import LiveAgent, wait_for

VALVE = [sys.executable, "-m", "valve_cli.main"]
TOO_LARGE = (
    POLICY.replace("memory: 128Mi", "memory: 4Ti").replace("2Mi\n", "512Mi\n").replace("2Mi,", "512Mi,")
).replace("16Mi", "8Gi")


def agent_says(tmp_path: Path, policy: str | None, *arguments: str) -> tuple[int, str]:
    """(exit status, standard error) of an agent that should not start."""
    path = tmp_path / "policy.yaml"
    if policy is not None:
        path.write_text(policy)
    done = subprocess.run(
        [*VALVE, "agent", "--policy", str(path), "--socket", str(tmp_path / "a.sock"), *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("policy", "sentences"),
    [
        pytest.param(None, ["there is no such file"], id="no file"),
        pytest.param(POLICY.replace("slabSize", "slabsize"), ["spec.memory.slabsize"], id="unknown field"),
        pytest.param(POLICY.replace("400ms", "400"), ["spec.compute.lease", "400"], id="no unit"),
        pytest.param(
            TOO_LARGE, ["the machine has", "write", "or less"], id="a device larger than the machine"
        ),
    ],
)  # fmt: skip
def test_a_bad_policy_stops_the_agent_with_a_sentence(
    tmp_path: Path, policy: str | None, sentences: list[str]
) -> None:
    status, text = agent_says(tmp_path, policy)
    assert status == 2, text
    for sentence in sentences:
        assert sentence in text
    assert "Traceback" not in text
    assert not (tmp_path / "a.sock").exists()


def test_a_second_agent_does_not_steal_the_socket(agent: LiveAgent) -> None:
    done = subprocess.run(
        [*VALVE, "agent", "--policy", str(agent.folder / "policy.yaml"), "--socket", str(agent.socket)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "another agent listens" in done.stderr
    assert agent.status()["pid"] == agent.pid


def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(tmp_path / "agent.sock"))
    stale.close()
    with LiveAgent(tmp_path, POLICY) as agent:
        assert agent.socket.stat().st_mode & 0o777 == 0o666
        assert agent.socket.parent.stat().st_mode & 0o022 == 0
    (tmp_path / "a.sock").write_text("precious")
    status, text = agent_says(tmp_path, POLICY)
    assert status == 2
    assert "is no socket" in text
    assert (tmp_path / "a.sock").read_text() == "precious"


def test_default_sockets() -> None:
    assert default_path({}, 0) == Path("/run/valve/agent.sock")
    assert default_path({"XDG_RUNTIME_DIR": "/run/user/7"}, 7) == Path("/run/user/7/valve/agent.sock")


def test_at_rest_the_agent_is_small_and_still(agent: LiveAgent) -> None:
    main = psutil.Process(agent.pid)
    processes = [main, *main.children(recursive=True)]
    assert len(processes) == 2, "main and gate"
    assert sum(process.memory_info().rss for process in processes) < 80 << 20
    wait_for("recovery to end", lambda: agent.events("resume"))

    def cpu_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before, began = cpu_s(), time.monotonic()
    time.sleep(5)
    assert (cpu_s() - before) / (time.monotonic() - began) < 0.01


def test_metrics_and_status_tell_the_same(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with LiveAgent(tmp_path, POLICY, arguments=("--metrics-port", str(port))) as agent:

        def scrape() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                return str(answer.read().decode())

        text = wait_for("a first snapshot", lambda: (t := scrape()) and "valve_device_free_bytes" in t and t)
        slabs = agent.status()["slabs"]
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        free_bytes = float(values['valve_device_free_bytes{device="cpu"}'])
        assert free_bytes == slabs["free"] * slabs["bytes_each"]
        for name in (
            "valve_preemptions_total", "valve_preemption_latency_seconds_bucket", "valve_offline_paused",
            "valve_reclaims_total", "valve_reclaimed_bytes_total", "valve_reservation_bytes",
        ):  # fmt: skip
            assert name in text
        done = subprocess.run(
            [*VALVE, "status", "--json", "--socket", str(agent.socket)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)["slabs"]["total"] == 64


def test_status_without_an_agent_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [*VALVE, "status", "--socket", str(tmp_path / "none.sock")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "valve agent" in done.stderr
