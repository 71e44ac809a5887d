# SPDX-License-Identifier: Apache-2.0
"""The Valve phase: an agent, both engines as its tenants, the same load.

The agent is `valve agent` and the engines run under `valve run`, as a user would start
them.  What Valve did is read from the agent's event log, never inferred.  Single asyncio
loop; called by `main.py`.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from valve_cli.bench.rig import valve_run
from valve_cli.demo.errors import MeasurementError, ProcessError
from valve_cli.demo.events import Timeline, parse
from valve_cli.demo.measure import ValveRecord
from valve_cli.demo.phases import Pair, Phases, start_pair
from valve_cli.demo.processes import Child, Tail
from valve_cli.demo.progress import Progress
from valve_cli.demo.settings import Settings
from valve_cli.status import StatusError, read_status

AGENT_TIMEOUT_S = 20.0
DRAIN_TIMEOUT_S = 300.0
VALVE = (sys.executable, "-m", "valve_cli.main")


class Watch:
    """Follows the agent's event log: the timeline for the report, the gate for the display."""

    def __init__(self, events: Path, progress: Progress, slabs_total: int) -> None:
        self.timeline = Timeline()
        self._tail = Tail(events)
        self._progress = progress
        self._slabs_total = slabs_total

    def poll(self) -> None:
        """Take in what the agent has written since the last call."""
        for line in self._tail.lines():
            if line:
                self.timeline.add(parse(line))
        progress, timeline = self._progress, self.timeline
        progress.gate = "paused" if timeline.paused else "open"
        progress.preemptions = len(timeline.pauses)
        progress.reclaims = sum(1 for r in timeline.reclaims if r.bytes_in_use)
        progress.slabs_total = self._slabs_total
        if timeline.pool:
            progress.slabs = dict(sorted(timeline.pool[-1].held.items()))
            progress.reserved = timeline.pool[-1].reservation

    def close(self) -> None:
        self._tail.close()


async def start_agent(settings: Settings, env: dict[str, str], socket: Path, events: Path) -> Child:
    """`valve agent` on the cpu device; it listens when this returns."""
    command = [*VALVE, "agent", f"--policy={settings.policy}", "--device=cpu", f"--socket={socket}"]
    command += [f"--events={events}", "--metrics-port=0"]
    agent = await Child.start("the agent", command, settings.logs / "agent.log", env)
    try:
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while not socket.exists():
            agent.check()
            if time.monotonic() > deadline:
                raise ProcessError(f"the agent did not listen within {AGENT_TIMEOUT_S:g} s", agent.log)
            await asyncio.sleep(0.1)
    except BaseException:
        await agent.stop()
        raise
    return agent


async def valve_phase(
    settings: Settings,
    env: dict[str, str],
    engine_env: dict[str, str],
    phases: Phases,
    progress: Progress,
    info: dict[str, str],
) -> ValveRecord:
    """Run the phase from nothing to nothing; `info` gets the engines' versions."""
    folder = Path(tempfile.mkdtemp(prefix="valve-demo-"))  # a socket's path must be short
    socket, events = folder / "agent.sock", settings.logs / "events.jsonl"
    progress.begin("valve", "the agent starts, both engines load the model under it", 40.0)
    try:
        agent = await start_agent(settings, env, socket, events)
        try:
            return await _under_agent(settings, engine_env, phases, progress, info, socket, events, agent)
        finally:
            await agent.stop()
    finally:
        shutil.rmtree(folder)


async def _under_agent(
    settings: Settings,
    env: dict[str, str],
    phases: Phases,
    progress: Progress,
    info: dict[str, str],
    socket: Path,
    events: Path,
    agent: Child,
) -> ValveRecord:
    def wrap(role: str) -> Sequence[str]:
        return valve_run(socket, settings.runtime, role, role, [])

    watch = Watch(events, progress, settings.device_bytes // settings.slab_bytes)
    fault = {"VALVE_FAULT": settings.fault} if settings.fault else {}
    pair = await start_pair(settings, env, "valve", settings.device_bytes, wrap, fault)
    try:
        info.update({k: str(pair.offline.info[k]) for k in ("vllm", "torch")})
        await phases.warm_up(pair)
        return await _measured(settings, phases, progress, pair, watch, socket, agent)
    finally:
        watch.close()
        await pair.stop()


async def _measured(
    settings: Settings,
    phases: Phases,
    progress: Progress,
    pair: Pair,
    watch: Watch,
    socket: Path,
    agent: Child,
) -> ValveRecord:
    def observe() -> None:
        agent.check()
        watch.poll()

    sequences = settings.offline.sequences
    progress.begin("valve", "offline fills the device's memory", phases.replay_s + 20, online=True)
    await phases.fill(pair.offline, sequences, "valve", observe)
    before = counters(socket)
    progress.detail = "both engines under Valve"
    requests, window = await phases.replay(pair, pair.offline, observe)
    progress.begin("valve", "offline finishes what it has begun, for the comparison", 20.0)
    await pair.offline.drain(DRAIN_TIMEOUT_S)
    after = counters(socket)
    await asyncio.sleep(0.5)  # the event log is written by a thread of its own
    observe()
    record = phases.offline_record("valve", pair.offline, window, sequences)
    record.requests = requests
    return ValveRecord(
        phase=record,
        timeline=watch.timeline,
        requests_recomputed=after["recomputed"] - before["recomputed"],
        tokens_recomputed=after["recomputed_tokens"] - before["recomputed_tokens"],
    )


def counters(socket: Path) -> dict[str, int]:
    """What the offline engine's own counters say, as the agent reads them from its page."""
    try:
        tenant: dict[str, Any] = read_status(socket)["tenants"]["offline"]
        return {name: int(tenant[name]) for name in ("recomputed", "recomputed_tokens")}
    except StatusError as error:
        raise MeasurementError(f"the agent does not answer: {error}") from error
    except KeyError as error:
        raise MeasurementError(f"the agent's status has no {error} of the offline engine") from error
