# SPDX-License-Identifier: Apache-2.0
"""The plugins' GPU path against real engines without a GPU. The checks are in engines_on_gpu.py."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest
from engine_process import environment

PROGRAM = Path(__file__).with_name("engines_on_gpu.py")


def _names() -> list[str]:
    """The tuple CHECKS of the program, which this Python cannot import: it has no torch."""
    for node in ast.parse(PROGRAM.read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CHECKS":
            assert isinstance(node.value, ast.Tuple)
            return [ast.unparse(name) for name in node.value.elts]
    raise AssertionError("no CHECKS")


@pytest.fixture(scope="module")
def answers(engine_python: Path) -> dict[str, str]:
    done = subprocess.run(
        [str(engine_python), "-P", str(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", _names())
def test_against_the_real_engines(answers: dict[str, str], name: str) -> None:
    assert answers[name] == "", answers[name]
