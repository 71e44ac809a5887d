# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` as the online tenant: busy from the earliest point until the last request has left,
however it leaves; memory asked for when requests come and given back when they are gone."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import engine_panels
import pytest
from engine_process import START_S, environment

from valve_cli.bench.rig import LiveAgent, RigError, valve_run, wait_for
from valve_cli.demo.loadgen import tokens_of

FLOOR_BLOCKS = 4
TOKENS = 24
PROMPT = "Tell me a long story about the sea and the people who live by it. " * 8


class Server:
    """`vllm serve` under `valve run`, and its clients."""

    def __init__(self, agent: LiveAgent, port: int) -> None:
        self.agent = agent
        self.port = port

    def request(self, **fields: Any) -> http.client.HTTPResponse:
        """A streamed completion; the response is not read yet and closes its connection with itself."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"model": "m", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        connection.request(
            "POST", "/v1/completions", json.dumps({**body, "stream": True, **fields}),
            {"Content-Type": "application/json", "Connection": "close"},
        )  # fmt: skip
        return connection.getresponse()

    def processes(self) -> list[dict[str, Any]]:
        processes = self.agent.status()["tenants"]["serve"]["processes"]
        return [process for process in processes if "busy" in process]

    def held_slabs(self) -> int:
        return int(self.agent.status()["tenants"]["serve"]["held_slabs"])

    def wait_idle(self) -> None:
        """Until no process is busy and the event log, which is written a little later, says so too."""

        def idle() -> bool:
            count = {name: len(self.agent.events(name)) for name in ("busy", "idle")}
            return not any(p["busy"] for p in self.processes()) and count["busy"] == count["idle"]

        wait_for("every process to be idle", idle)

    def busy_times(self) -> dict[int, int]:
        """How often each process turned busy so far."""
        counts: dict[int, int] = {}
        for event in self.agent.events("busy"):
            counts[event["pid"]] = counts.get(event["pid"], 0) + 1
        return counts


@pytest.fixture
def server(
    agent: LiveAgent, runtime: Path, engine_python: Path, model: Path, tmp_path: Path
) -> Iterator[Server]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [
        str(engine_python.with_name("vllm")), "serve", str(model), "--served-model-name", "m", "--host",
        "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager", "--block-size", "32",
        "--max-model-len", "1024", "--max-num-seqs", "16", "--no-enable-prefix-caching",
    ]  # fmt: skip
    settings = {"VALVE_KV_FLOOR_BLOCKS": str(FLOOR_BLOCKS), "VALVE_KV_IDLE_RETURN_S": "0.3"}
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            valve_run(agent.socket, runtime, "online", "serve", program),
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment(settings),
        )  # fmt: skip
    try:
        wait_for("vllm serve to listen", lambda: _healthy(process, port, log), START_S)
        yield Server(agent, port)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    if process.poll() is not None:
        raise RigError(f"vllm serve ended:\n{log.read_text()[-4000:]}")
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=2)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def test_busy_idle_and_memory(server: Server, tmp_path: Path) -> None:
    """One engine, one story: starting it is what costs."""
    # Started: idle, and no more memory than its floor.
    server.wait_idle()
    floor = server.held_slabs()
    assert 1 <= floor <= FLOOR_BLOCKS + 2
    before = server.busy_times()
    assert len(server.processes()) >= 2, "the API server and the engine core are tenants"

    # A request: both processes turn busy once, and memory comes.
    prompt = PROMPT * 5  # some 600 tokens: 20 blocks of 0.7 MiB
    with server.request(prompt=prompt, return_token_ids=True) as response:
        assert response.status == 200
        first_line = response.readline()
        assert all(process["busy"] for process in server.processes())
        assert server.held_slabs() >= floor + 5
        lines = (first_line + response.read()).splitlines()  # a server that lags sends several tokens in one
        chunks = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: {")]
        assert sum(len(tokens_of(json.loads(chunk))) for chunk in chunks) == TOKENS
    server.wait_idle()
    once = server.busy_times()
    assert {pid: once[pid] - before.get(pid, 0) for pid in once} == dict.fromkeys(once, 1)
    assert len(once) >= 2
    assert any(event["decode_gap_us"] > 0 for event in server.agent.events("idle"))

    # It leaves: memory goes back down to the floor.
    wait_for("memory to be given back", lambda: server.held_slabs() <= floor + 1)

    # A client that hangs up: the request is aborted, everything turns idle.
    response = server.request(max_tokens=900)
    response.readline()
    assert all(process["busy"] for process in server.processes())
    response.close()
    server.wait_idle()

    # Requests that are refused leave nothing busy.
    for fields in ({"prompt": PROMPT * 80}, {"max_tokens": -3}, {"temperature": -1}):
        with server.request(**fields) as response:
            assert response.status == 400
            response.read()
    server.wait_idle()

    # Overlapping requests are one busy period, and the engine still serves.
    before = server.busy_times()
    first = server.request(max_tokens=48)
    first.readline()
    with server.request(max_tokens=8) as second:
        second.read()
    assert all(process["busy"] for process in server.processes()), "the first request is still there"
    first.read()
    first.close()
    server.wait_idle()
    after = server.busy_times()
    assert {pid: after[pid] - before[pid] for pid in after} == dict.fromkeys(after, 1)
    time.sleep(0.2)
    server.wait_idle()

    # What the dashboards ask of vLLM itself has an answer.
    engine_panels.check("vllm", server.port, tmp_path, lambda: server.request(max_tokens=16).read())
