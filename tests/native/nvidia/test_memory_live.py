# SPDX-License-Identifier: Apache-2.0
"""The same with everything real: `valve agent --device nvidia`, its gate, its routes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_rig import POLICY, Rig, wait_for

import fakenv
from valve_cli.status import StatusError, read_status


class LiveRig(Rig):
    def start_agent(self) -> None:
        self.log = (self.folder / "agent.log").open("ab")
        self.agent = subprocess.Popen(
            [*self.machine.prefix(), sys.executable, "-m", "valve_cli.main", "agent", "--device", "nvidia",
             "--policy", str(self.folder / "policy.yaml"), "--socket", str(self.socket),
             "--events", str(self.events_path)],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, text=True,
            env=self.machine.environment(),
        )  # fmt: skip
        wait_for("the agent", self._answers)

    def _answers(self) -> Any:
        assert self.agent.poll() is None, (self.folder / "agent.log").read_text()
        try:
            return read_status(self.socket)
        except StatusError:
            return None


@pytest.fixture
def live(fakenv_binaries: Path, bundle: Path, tmp_path: Path) -> Iterator[LiveRig]:
    policy = POLICY.replace("lease: 2s", "lease: 2s, recoveryGrace: 300ms").replace("    pool: 100%\n", "")
    with (
        fakenv.Machine(fakenv_binaries, memory_mib=64) as machine,
        LiveRig(machine, bundle, tmp_path, policy=policy) as rig,
    ):
        yield rig


def test_a_running_kernel_is_taken_from_by_the_real_agent(live: LiveRig) -> None:
    offline = live.tenant("offline", "batch", slabs=19)
    got = offline.run("result = get(18)")
    assert len(got) == 18, "60 % of 64 MiB, less the reservation"
    offline.run("for s in held: put(s, 0xA0 + s)")
    live.start_kernel(offline, 18)
    online = live.take(19, 10)
    assert online.run("result = [see(s) for s in sorted(held)]") == [0] * 10
    online.run("for s in held: put(s, 0xB0 + s)")
    offline.run("poll(); cu.synchronize()")
    assert len(offline.run("result = lost")) >= 9
    assert online.run("result = [see(s) for s in sorted(held)]") == [0xB0 + s for s in range(10)]
    status = live.machine.status()
    assert (status["remaps_while_running"], status["xids"]) == (0, [[0, 0]])
    assert live.agent.poll() is None
