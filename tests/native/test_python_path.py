# SPDX-License-Identifier: Apache-2.0
"""VALVE_PYTHONPATH: the engine plugins are importable, and the image's own PYTHONPATH still counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OURS = "/opt/valve/1/python"
ASK = "import os, sys; print(os.environ.get('PYTHONPATH', '-'), *sys.path[1:4])"


def python(library: Path, tmp_path: Path, program: str, **env: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    preload = {"LD_PRELOAD": str(library), "VALVE_SOCKET": str(tmp_path / "no.sock")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, **preload, "VALVE_WORKLOAD": "online", **env},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("description", "env", "expected"),
    [
        ("no PYTHONPATH before", {}, OURS),
        ("an empty one", {"PYTHONPATH": ""}, OURS),
        ("the image's own is kept behind", {"PYTHONPATH": "/app:/lib"}, f"{OURS}:/app:/lib"),
        ("a longer path with our prefix is another", {"PYTHONPATH": f"{OURS}3"}, f"{OURS}:{OURS}3"),
        ("ours is there already, last", {"PYTHONPATH": f"/app:{OURS}"}, f"/app:{OURS}"),
        ("ours is there already, alone", {"PYTHONPATH": OURS}, OURS),
        ("nothing asked for", {"VALVE_PYTHONPATH": "", "PYTHONPATH": "/app"}, "/app"),
        ("no agent's process", {"VALVE_SOCKET": "", "PYTHONPATH": "/app"}, "/app"),
    ],
)
def test_python_path(
    library: Path, tmp_path: Path, description: str, env: dict[str, str], expected: str
) -> None:
    seen, *path = python(library, tmp_path, ASK, **{"VALVE_PYTHONPATH": OURS, **env}).split()
    assert seen == expected, description
    assert path[: expected.count(":") + 1] == expected.split(":"), description


def test_a_child_finds_it_once(library: Path, tmp_path: Path) -> None:
    ask = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ASK!r}], check=True)"
    seen = python(library, tmp_path, ask, VALVE_PYTHONPATH=OURS, PYTHONPATH="/app").split()
    assert seen[0] == f"{OURS}:/app"
