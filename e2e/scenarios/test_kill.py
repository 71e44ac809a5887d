# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the middle of colocation, with two real vLLM engines: the agent, the online engine, the
offline engine.  One pair of engines serves all three, in this order, since the second and third end one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from valve_api import load_policy, settings_for
from valve_cli.bench.rig import valve_run
from valve_cli.demo.engines import MODEL_NAME, engine_environment
from valve_cli.demo.main import SHIPPED_TRACE
from valve_cli.demo.phases import Pair, start_pair
from valve_cli.demo.processes import Child
from valve_cli.demo.settings import OfflineLoad, Settings
from valve_cli.demo.valve_phase import start_agent
from valve_cli.status import StatusError, read_status

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "examples/demo.yaml"
PATIENCE_S = 300.0


class Traffic:
    """One short online request after another; failures are counted, not raised."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answered = 0
        self.errors: list[str] = []

    async def run(self) -> None:
        body = {"model": MODEL_NAME, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            while True:
                try:
                    async with session.post(f"{self.url}/v1/completions", json=body) as response:
                        text = await response.text()
                        if response.status == 200:
                            self.answered += 1
                        else:
                            self.errors.append(f"{response.status}: {text[:200]}")
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.errors.append(repr(error))
                await asyncio.sleep(0.5)


def state(pid: int) -> str:
    """The process's state letter; X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


async def until(what: str, condition: Callable[[], bool], watch: Callable[[], None] | None = None) -> float:
    """Seconds until the condition held; fails with `what` after PATIENCE_S."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < PATIENCE_S, f"{what} did not happen within {PATIENCE_S:g} s"
        if watch is not None:
            watch()
        await asyncio.sleep(0.02)
    return time.monotonic() - begin


def tokens(pair: Pair) -> int:
    pair.offline.poll()
    return pair.offline.samples[-1][1] if pair.offline.samples else 0


def slabs(socket: Path, tenant: str) -> int | None:
    """Slabs the tenant holds; None while the agent does not answer or does not know it."""
    try:
        document: dict[str, Any] = read_status(socket)
    except StatusError:
        return None
    entry = document["tenants"].get(tenant)
    return None if entry is None else int(entry["held_slabs"])


def gate_child(agent: Child) -> int:
    """The gate process, which must not outlive the agent it belongs to."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert len(children) == 1, children
    return int(children[0])


@pytest.mark.timeout(900)
def test_each_of_the_three_may_be_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    asyncio.run(scenario(tmp_path_factory.mktemp("kill")))


async def scenario(out: Path) -> None:
    effective = settings_for(load_policy(POLICY))
    run = Settings(
        model=(ROOT / "build/model").absolute(),
        engine_python=(ROOT / "build/engines/bin/python").absolute(),
        runtime=(ROOT / "build/runtime").absolute(),
        policy=POLICY,
        out=out,
        device_bytes=effective.device_bytes,
        slab_bytes=effective.slab_bytes,
        trace=SHIPPED_TRACE,
        offline=OfflineLoad(prompts=32, sequences=48),
    )
    env = dict(os.environ)
    socket = out / "a.sock"
    agent = await start_agent(run, env, socket, out / "events.jsonl")
    pair: Pair | None = None
    traffic_task: asyncio.Task[None] | None = None
    try:

        def wrap(role: str) -> list[str]:
            return valve_run(socket, run.runtime, role, role, [])

        pair = await start_pair(run, engine_environment(run, env), "kill", effective.device_bytes, wrap)
        engine = pair
        traffic = Traffic(pair.online.url)
        traffic_task = asyncio.create_task(traffic.run())
        await pair.offline.feed(run.offline.sequences, "kill")
        offline = int(pair.offline.info["pid"])
        begun = tokens(pair)
        await until("colocation", lambda: traffic.answered > 3 and tokens(engine) > begun + 200)

        # The agent: offline stops itself within the lease, online does not notice.
        gate = gate_child(agent)
        os.kill(agent.pid, signal.SIGKILL)
        waited_s = await until("offline's self-stop", lambda: state(offline) == "T")
        assert waited_s < effective.lease_ns / 1e9 + 1.0, "the lease, and a second for a crowded machine"
        await until("the end of the gate", lambda: state(gate) in "XZ")
        at_stop, answered = tokens(pair), traffic.answered
        await until("online service without an agent", lambda: traffic.answered >= answered + 3)
        assert tokens(pair) == at_stop, "offline computed without an agent"
        await agent.stop()
        agent = await start_agent(run, env, socket, out / "events.jsonl")
        await until("offline's return", lambda: tokens(engine) > at_stop + 200)
        assert int(pair.offline.info["pid"]) == offline
        assert state(offline) != "X"
        held = slabs(socket, "offline")
        assert held, "the new agent does not know what offline holds"
        assert traffic.errors == []

        # The online engine, with a request in flight: offline goes on after T_cool.
        answered = traffic.answered
        await until("one more answer", lambda: traffic.answered > answered)
        pair.online.child.signal(signal.SIGKILL)
        at_kill = tokens(pair)
        await until("offline's progress without online", lambda: tokens(engine) > at_kill + 200)
        await until("online's slabs back in the pool", lambda: slabs(socket, "online") in (0, None))

        # The offline engine: its slabs are back in the pool.
        os.kill(offline, signal.SIGKILL)
        await until("offline's slabs back in the pool", lambda: slabs(socket, "offline") in (0, None))
        document = read_status(socket)
        assert document["slabs"]["free"] == document["slabs"]["total"]
        agent.check()
    finally:
        if traffic_task is not None:
            traffic_task.cancel()
        if pair is not None:
            await pair.stop()
        await agent.stop()
