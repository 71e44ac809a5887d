# SPDX-License-Identifier: Apache-2.0
"""The serving part: online TTFT and TPOT, offline tokens per second, in seven arrangements of one run.

    alone             each engine has the GPU to itself
    naive             both, nothing between them
    stream-priority   both; online's streams are of high priority, offline's of low
    mps               both under an MPS server of this part's own
    launch-gate       both; Valve holds offline's launches while online is busy
    in-process, agent both; Valve disables offline's channels, by either route

Engines: transformers' continuous batching, a model of random weights with 1.1 billion parameters (device
`fake`: a tiny one on the CPU, for the path only). Without torch and transformers the part is skipped.

Threading model: the part's main thread. Called by qualify.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qualification.machine import Machine, Tools
from qualification.processes import RigError
from qualification.record import Found, Skip, spread
from qualification.rig import Rig
from valve_agent.gate_link import GateError, GateHandle, GateSettings

WORKER = Path(__file__).resolve().parent / "serving_worker.py"
READY_S = 150.0
VALVE = ("agent", "in-process", "launch-gate")


class Worker:
    """An engine process; see serving_worker.py."""

    def __init__(self, role: str, model: str, environment: dict[str, str], *options: str) -> None:
        command = [sys.executable, str(WORKER), "--role", role, "--model", model, *options]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def ready(self) -> dict[str, Any]:
        return self._read(READY_S)

    def begin(self, seconds: float, rate: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds} {rate}\n")
        self._process.stdin.flush()
        self._seconds = seconds

    def end(self) -> dict[str, Any]:
        return self._read(self._seconds + 90)

    def _read(self, within_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], within_s)[0]:
            raise RigError(f"an engine said nothing for {within_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RigError(f"an engine ended with {self._process.wait(10)}; its standard error says why")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait(30)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def serving(machine: Machine, tools: Tools, count: int) -> Found:
    """`count` seconds per phase."""
    lacking = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if lacking:
        raise Skip(f"{' and '.join(lacking)} missing in {sys.executable}: install them, or set PYTHON")
    figures: dict[str, Any] = {}
    notes: list[str] = []
    model, rate = ("tiny", 2.0) if machine.is_fake else ("1b", 4.0)
    environment = _environment(machine)
    with contextlib.closing(Worker("online", model, environment)) as online:
        figures["model"] = online.ready()
        figures["alone"] = {"online": _one(online, count, rate)}
        with contextlib.closing(Worker("offline", model, environment)) as offline:
            offline.ready()
            figures["alone"]["offline"] = _one(offline, count, rate)
            figures["naive"] = _both(online, offline, count, rate)
    tools.clock.keep(figures)

    def by_mps() -> dict[str, Any]:
        with _mps(machine) as under:
            return _pair(model, {**environment, **under}, {**environment, **under}, count, rate)

    def by_priority() -> dict[str, Any]:
        if machine.is_fake:
            raise Skip("it differs on a GPU only")
        options = ("--priority", "high"), ("--priority", "low")
        return _pair(model, environment, environment, count, rate, *options)

    arrangements: dict[str, Callable[[], dict[str, Any]]] = {
        **{route: partial(_valve, machine, tools, route, model, count, rate) for route in VALVE},
        "mps": by_mps,
        "stream-priority": by_priority,
    }
    for name, arrangement in arrangements.items():
        try:
            if tools.clock.left_s < count:
                raise Skip("the part's time is spent")
            figures[name] = arrangement()
        except (Skip, RigError, GateError, OSError, subprocess.TimeoutExpired) as problem:
            notes.append(f"{name}: {problem}")
        tools.clock.keep(figures)
    if machine.is_fake:
        notes.append("compute is on the CPU, so no route stops it: what counts is that busy and idle arrive")
    return _judge(figures, notes)


def _environment(machine: Machine) -> dict[str, str]:
    """The CUDA runtime cannot live on a fake driver, so there the engines must not find its libcuda. They
    compute on the CPU then, one thread each: two engines that spin for each other would measure that."""
    if machine.is_fake:
        os.environ.pop("LD_LIBRARY_PATH", None)  # for the processes of the rig, too
        os.environ["OMP_NUM_THREADS"] = "1"
    return dict(os.environ)


def _judge(figures: dict[str, Any], notes: list[str]) -> Found:
    alone = figures["alone"]
    for name, found in figures.items():
        if name == "model" or "online" not in found:
            continue
        online = found["online"]
        found["ratios to alone"] = {
            "ttft p50": _ratio(online["ttft_ms"], alone["online"]["ttft_ms"], "p50"),
            "ttft p99": _ratio(online["ttft_ms"], alone["online"]["ttft_ms"], "p99"),
            "tpot p50": _ratio(online["tpot_ms"], alone["online"]["tpot_ms"], "p50"),
            "offline tokens": round(
                found["offline"]["tokens_per_s"] / max(alone["offline"]["tokens_per_s"], 1e-9), 3
            ),
        }
    broken = [
        f"{name}: {engine}"
        for name, found in figures.items()
        for engine in ("online", "offline")
        if isinstance(found, dict) and found.get(engine, {}).get("errors")
    ]
    best = next((name for name in VALVE if name in figures), "")
    idle = [name for name in VALVE if name in figures and not figures[name]["pauses"]]
    if idle:
        return Found("fail", f"online served, and no pause came by {', '.join(idle)}", figures, notes)
    if broken or not best:
        return Found("fail", f"errors in {', '.join(broken) or 'every route of Valve'}", figures, notes)
    ratios = figures[best]["ratios to alone"]
    return Found(
        "finding",
        f"route {best}: TTFT p99 {ratios['ttft p99']} x, TPOT {ratios['tpot p50']} x of alone; "
        f"offline {ratios['offline tokens']} x of alone",
        figures,
        notes,
    )


def _ratio(this: dict[str, float], base: dict[str, float], key: str) -> float | None:
    return round(this[key] / base[key], 3) if base.get(key) and this.get(key) else None


def _one(worker: Worker, seconds: float, rate: float) -> dict[str, Any]:
    worker.begin(seconds, rate)
    return worker.end()


def _both(online: Worker, offline: Worker, seconds: float, rate: float) -> dict[str, Any]:
    online.begin(seconds, rate)
    offline.begin(seconds, rate)
    return {"online": online.end(), "offline": offline.end()}


def _pair(
    model: str,
    online_environment: dict[str, str],
    offline_environment: dict[str, str],
    seconds: float,
    rate: float,
    online_options: tuple[str, ...] = (),
    offline_options: tuple[str, ...] = (),
) -> dict[str, Any]:
    with (
        contextlib.closing(Worker("online", model, online_environment, *online_options)) as online,
        contextlib.closing(Worker("offline", model, offline_environment, *offline_options)) as offline,
    ):
        online.ready()
        offline.ready()
        return _both(online, offline, seconds, rate)


def _valve(
    machine: Machine, tools: Tools, route: str, model: str, seconds: float, rate: float
) -> dict[str, Any]:
    gate = GateHandle.start(f"nvidia:{route}/none", GateSettings(lease_ns=60_000_000_000))
    try:
        with Rig(machine, tools, gate=gate) as rig:
            more = {**_environment(machine), "VALVE_LIBRARY": str(tools.libvalve)}
            found = _pair(
                model,
                {**more, **rig.environment("online")},
                {**more, **rig.environment("offline")},
                seconds,
                rate,
            )
            pauses = [event for event in gate.read_events() if event["event"] == "pause"]
            found["pauses"] = len(pauses)
            found["signal to evicted"] = spread([pause["latency_us"] * 1e3 for pause in pauses])
            found["problems"] = rig.problems
            return found
    finally:
        gate.close()


@contextlib.contextmanager
def _mps(machine: Machine) -> Iterator[dict[str, str]]:
    """An MPS server of our own, in folders of our own; no setting of the GPU is changed. Raises Skip."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None or machine.is_fake:
        raise Skip("nvidia-cuda-mps-control is not on PATH" if not machine.is_fake else "the fake has no MPS")
    with tempfile.TemporaryDirectory(prefix="valve-mps-") as folder:
        environment = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in environment.values():
            Path(path).mkdir()
        with open(f"{folder}/out", "wb") as out:  # the daemon keeps it open
            started = subprocess.run(
                [control, "-d"],
                env={**os.environ, **environment},
                stdout=out,
                stderr=out,
                timeout=30,
                check=False,
            )
        if started.returncode:
            raise Skip(f"MPS does not start: {Path(folder, 'out').read_text().strip()}")
        try:
            yield environment
        finally:
            subprocess.run(
                [control], input="quit -t 10\n", text=True, env={**os.environ, **environment},
                timeout=60, check=False,
            )  # fmt: skip
            time.sleep(1)
