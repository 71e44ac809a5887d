# SPDX-License-Identifier: Apache-2.0
"""The engines' environment, the model, a real agent and an online tenant that takes memory.

The environment and the model are found where `make` puts them (build/engines, build/model) and built if they
are not there, which takes minutes the first time on a machine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from valve_cli.bench.rig import LiveAgent, LiveTenant

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "fakenv"))
SLABS = 96
SLAB_BYTES = 2 << 20
POLICY = f"""\
apiVersion: valve.io/v1alpha1
kind: ColocationPolicy
metadata: {{name: test}}
spec:
  cpuDevice: {{memory: {SLABS * 2}Mi}}
  compute: {{lease: 2s, recoveryGrace: 500ms, cooldown: {{min: 5ms, max: 100ms}}}}
  memory:
    slabSize: 2Mi
    onlineFloor: 0%
    reservation: {{min: 2Mi, max: 8Mi, quietPeriod: 60s}}
  offline: {{defaultMemory: 100%}}
  guardrails: {{maxReclaimsPerMinute: 6000}}
"""


def _run(what: str, *command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        pytest.fail(f"{what} cannot be built: {done.stderr or done.stdout}")
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def engine_python() -> Path:
    link = ROOT / "build" / "engines"
    python = link / "bin" / "python"
    if not python.exists():
        _run("the engines' environment", sys.executable, "runtime/engines/build_env.py", "--link", link)
    return python


@pytest.fixture(scope="session")
def model(engine_python: Path) -> Path:
    link = ROOT / "build" / "model"
    if not (link / "config.json").exists():
        _run("the model", engine_python, "runtime/engines/model.py", "--link", link)
    return link.resolve()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[LiveAgent]:
    with LiveAgent(tmp_path, POLICY) as live:
        yield live


@pytest.fixture
def thief(agent: LiveAgent, runtime: Path) -> Iterator[LiveTenant]:
    """An online tenant that has an arena as large as the device."""
    with LiveTenant(agent.socket, runtime, "online", name="thief") as tenant:
        assert tenant.ask("attach", timeout_ms=15_000)["attached"], tenant.ask("state")
        tenant.ask("arena", slabs=SLABS, slab_bytes=SLAB_BYTES)
        yield tenant
