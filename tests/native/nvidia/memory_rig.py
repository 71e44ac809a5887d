# SPDX-License-Identifier: Apache-2.0
"""A fake machine with an agent and tenants that use its memory, for the tests beside this file.

`Rig` starts and ends everything; `Tenant` is a process under `valve run` that executes what a test says, with
libvalve preloaded and its arena open.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakenv import Actor, Machine
from valve_cli.bench.rig import valve_run

ROOT = Path(__file__).resolve().parents[3]
SLAB = 2 << 20
POLICY = """\
apiVersion: valve.io/v1alpha1
kind: ColocationPolicy
metadata: {name: test}
spec:
  compute: {lease: 2s}
  memory:
    pool: 100%
    slabSize: 2Mi
    onlineFloor: 0%
    reservation: {min: 2Mi, max: 2Mi, quietPeriod: 60s}
  offline: {defaultMemory: 100%}
"""
START = """
import ctypes, os, time, rm, driver_api
from valve_runtime import _lib
cu = driver_api.Cuda()
out = cu.host(4096)
valve = _lib.load()
held, lost = set(), []
def opened(slabs):
    global arena
    arena = valve.arena_open(slabs * SLAB, 20000)
    return arena.base
def at(slab, offset=0):
    return arena.base + slab * SLAB + offset
def poll():
    while (event := valve.poll()) is not None:
        kind, slab = event
        if kind == _lib.GRANTED:
            held.add(slab)
        else:
            held.discard(slab); lost.append(slab)
    return sorted(held)
def get(count, timeout_s=20.0, urgent=False):
    valve.want(count, urgent)
    end = time.monotonic() + timeout_s
    while len(poll()) < count and time.monotonic() < end:
        time.sleep(0.002)
    return poll()
def put(slab, value):
    cu("cuMemsetD32_v2", at(slab), ctypes.c_uint(value), SLAB // 4)
def see(slab):
    return cu.read64(at(slab)) & 0xffffffff
"""


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)
    return result


class Tenant:
    """One tenant process. `run` executes code in it (see fakenv.Actor)."""

    def __init__(self, rig: Rig, role: str, name: str, memory: str | None) -> None:
        limit = ["--memory", memory] if memory else []
        self.actor: Actor = rig.machine.actor(*valve_run(rig.socket, rig.runtime, role, name, [], limit))
        self.pid = int(self.run(f"import os, sys; SLAB = {SLAB}; result = os.getpid()"))

    def begin(self, slabs: int = 0) -> Tenant:
        self.run(START)
        if slabs:
            self.run(f"opened({slabs})")
        return self

    def run(self, code: str) -> Any:
        return self.actor.run(code)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        wait_for("the stop", lambda: "T" in Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2][:3])

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.actor.process.wait(timeout=20)


class Rig:
    """Use as a context manager."""

    def __init__(self, machine: Machine, runtime: Path, folder: Path, slabs: int = 8, **options: Any) -> None:
        self.machine, self.runtime, self.folder = machine, runtime, folder
        self.socket = folder / "agent.sock"
        self.events_path = folder / "events.jsonl"
        policy = folder / "policy.yaml"
        policy.write_text(options.pop("policy", POLICY))
        self._config = {
            "machine": str(machine.socket), "socket": str(self.socket), "events": str(self.events_path),
            "policy": str(policy), "bytes": slabs * SLAB, **options,
            "path": [str(ROOT / part) for part in ("node_agent", "crds", "cli", "tests/fakenv")],
        }  # fmt: skip
        self.tenants: list[Tenant] = []
        self.start_agent()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        for tenant in self.tenants:
            tenant.kill()
        self.end_agent(signal.SIGKILL)

    def start_agent(self) -> None:
        script = Path(__file__).with_name("memory_agent.py")
        self.log = (self.folder / "agent.log").open("ab")
        self.agent = subprocess.Popen(
            [*self.machine.prefix(), sys.executable, str(script), json.dumps(self._config)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=self.machine.environment(),
        )  # fmt: skip
        assert self.agent.stdout is not None
        line = self.agent.stdout.readline()
        assert line == "ready\n", (self.folder / "agent.log").read_text()

    def end_agent(self, number: int) -> None:
        self.agent.send_signal(number)
        self.agent.wait(timeout=20)
        for pipe in (self.agent.stdin, self.agent.stdout, self.log):
            if pipe is not None:
                pipe.close()

    def ask(self, what: str = "state") -> Any:
        assert self.agent.stdin is not None
        assert self.agent.stdout is not None
        self.agent.stdin.write(json.dumps({"ask": what}) + "\n")
        self.agent.stdin.flush()
        return json.loads(self.agent.stdout.readline())

    def tenant(self, role: str, name: str, slabs: int = 0, memory: str | None = None) -> Tenant:
        tenant = Tenant(self, role, name, memory)
        self.tenants.append(tenant)
        return tenant.begin(slabs)

    def start_kernel(self, tenant: Tenant, slabs: int) -> None:
        """One that walks all of the first `slabs` of the tenant's arena for a while, and runs on return."""
        tenant.run(f"cu.launch('touch_pages', arena.base, {slabs} * SLAB, 4096, 7, 200000)")
        wait_for(
            "the kernel", lambda: any(c["state"] == "running" for c in self.machine.status()["channels"])
        )

    def take(self, arena_slabs: int, slabs: int) -> Tenant:
        """An online tenant that gets so many slabs at once, urgently."""
        online = self.tenant("online", "chat", slabs=arena_slabs)
        assert len(online.run(f"result = get({slabs}, urgent=True)")) == slabs
        return online

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.events_path.read_text().splitlines() if self.events_path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]
