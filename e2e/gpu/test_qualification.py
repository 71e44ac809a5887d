# SPDX-License-Identifier: Apache-2.0
"""The gpu lane: a short qualification of the GPU at hand. The long one is `make gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "qualify.py"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["e1", "e2", "e4", "e6", "e7", "e9", "e12", "e13"])
def test_part(part: str, tmp_path: Path) -> None:
    command = [sys.executable, PROGRAM, "--parts", part, "--scale", "0.02", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    (file,) = tmp_path.glob("gpu-*.json")
    document = json.loads(file.read_text())
    assert document["verdict"] in ("pass", "finding"), f"{document['answer']}\n{done.stderr}"
