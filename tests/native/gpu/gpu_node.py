# SPDX-License-Identifier: Apache-2.0
"""A GPU node on the fake driver: a real agent, real tenants, victims that tell what their kernels do.

Why it exists: the whole path is under test as users run it: `valve agent --device nvidia`, `valve run`, the
library that ships. Only the driver is fake. Threading model: the test's thread.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakenv import Actor, Machine
from valve_cli.bench.rig import LiveAgent, valve_run, wait_for

POLICY = """\
apiVersion: valve.io/v1alpha1
kind: ColocationPolicy
metadata: {{name: test}}
spec:
  compute: {{lease: 2s, recoveryGrace: 300ms, cooldown: {{min: 20ms, max: 200ms}}, route: {route}}}
  guardrails: {{pauseTimeout: {pause_timeout}, unknownProcesses: {unknown}}}
  memory:
    slabSize: 2Mi
    onlineFloor: 0%
    reservation: {{min: 2Mi, max: 16Mi, quietPeriod: 60s}}
  offline: {{defaultMemory: 100%}}
"""
VICTIM = """
import rm, driver_api, ctypes, os
cu = driver_api.Cuda()
out = cu.host(4096)
def stamp(): return [cu.read64(out), cu.read64(out + 8)]
"""
LONG_US = 60_000_000
ENGINE = """
import ctypes, os
lib = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[-1])
lib.valve_idle.argtypes = [ctypes.c_uint64]
lib.valve_attach(20000)
"""


class FakeNodeAgent(LiveAgent):
    """`valve agent --device nvidia` on a fake machine."""

    def __init__(self, machine: Machine, folder: Path, policy: str, *arguments: str) -> None:
        super().__init__(folder, policy, arguments=("--device", "nvidia", *arguments))
        self.machine = machine

    @property
    def pid_or_0(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        command = [
            *self.machine.prefix(), sys.executable, "-m", "valve_cli.main", "agent", "--policy",
            str(self._policy), "--socket", str(self.socket), "--events", str(self.events_path),
            *self._arguments,
        ]  # fmt: skip
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.machine.environment()
            )
        try:
            wait_for("the agent to listen", self._answers, 20)
        except BaseException:
            if self._process.poll() is None:
                self._process.kill()
            self.wait()
            raise


class Node:
    """A machine, its agent, and tenants on both."""

    def __init__(
        self,
        machine: Machine,
        folder: Path,
        bundle: Path,
        *,
        route: str = "auto",
        pause_timeout: str = "1s",
        unknown: str = "Report",
        arguments: tuple[str, ...] = (),
        knobs: dict[str, str] | None = None,
    ) -> None:
        """`knobs`: how the driver behaves, in words of its control protocol."""
        self.machine = machine
        for knob, value in (knobs or {}).items():
            machine.ctl(knob, value)
        self.bundle = bundle
        folder.mkdir(parents=True, exist_ok=True)
        policy = POLICY.format(route=route, pause_timeout=pause_timeout, unknown=unknown)
        self.agent = FakeNodeAgent(machine, folder, policy, *arguments)

    def start(self) -> Node:
        self.agent.start()
        return self

    def close(self) -> None:
        self.agent.stop()

    def tenant(self, workload: str, name: str, *, sees: str | None = None) -> Actor:
        """A Python process under `valve run` that does as it is told. `sees`: its CUDA_VISIBLE_DEVICES."""
        visible = [] if sees is None else ["env", f"CUDA_VISIBLE_DEVICES={sees}"]
        return self.machine.actor(*visible, *valve_run(self.agent.socket, self.bundle, workload, name, []))

    def victim(self, name: str = "victim", *, launch: bool = True, sees: str | None = None) -> Actor:
        """An offline process with a kernel that runs for a minute and writes the clock all along."""
        actor = self.tenant("offline", name, sees=sees)
        actor.run(VICTIM)
        if launch:
            actor.run(f"cu.launch('timer_writer', out, {LONG_US})")
            assert advances(actor)
        return actor

    def engine(self, name: str = "engine", *, sees: str | None = None) -> Actor:
        """An online process; see `busy` and `idle`."""
        actor = self.tenant("online", name, sees=sees)
        actor.run(ENGINE)
        return actor

    def pid_of(self, tenant: str) -> int:
        """The one process of a tenant."""
        (process,) = self.agent.status()["tenants"][tenant]["processes"]
        return int(process["pid"])

    def channels(self, engine: int | None = 1) -> list[dict[str, Any]]:
        """What the driver thinks of the tenants' channels (the agent has a context of its own)."""
        status = self.machine.status()
        ours = [c["handle"] for c in status["clients"] if c["pid"] == self.agent.pid_or_0]
        return [c for c in status["channels"] if engine in (None, c["engine"]) and c["client"] not in ours]


NewNode = Callable[..., Node]
"""Starts a node; see the fixture."""


def busy(engine: Actor) -> None:
    engine.run("lib.valve_busy()")


def idle(engine: Actor) -> None:
    engine.run("lib.valve_idle(0)")


def stands(victim: Actor, for_s: float = 0.03) -> bool:
    """Whether the victim's kernel makes no progress, by its own stamps in host memory."""
    before = victim.run("result = stamp()")
    time.sleep(for_s)
    after = victim.run("result = stamp()")
    return bool(before == after)


def advances(victim: Actor) -> bool:
    deadline = time.monotonic() + 20
    while stands(victim):
        if time.monotonic() > deadline:
            return False
    return True


def comes_to_stand(victim: Actor) -> bool:
    deadline = time.monotonic() + 20
    while not stands(victim):
        if time.monotonic() > deadline:
            return False
    return True
