# SPDX-License-Identifier: Apache-2.0
"""The kubectl plugin's front: its commands, wrong ones, and the starter that krew puts on the PATH."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from valve_cli import kubectl
from valve_cli.main import main as valve

ROOT = Path(__file__).resolve().parents[3]
STARTER = ROOT / "tools" / "krew" / "kubectl-valve"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        kubectl.main([])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in kubectl._HANDLERS:
        assert name in text


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        kubectl.main(["stop"])
    assert end.value.code == 2
    assert "explain" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["top", "explain", "drain-offline"])
def test_both_programs_have_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for main, prog in ((kubectl.main, "kubectl valve"), (valve, "valve")):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert f"usage: {prog} {command}" in capsys.readouterr().out


def test_the_console_script_is_the_plugin() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["kubectl-valve"] == "valve_cli.kubectl:main"


@pytest.mark.parametrize(
    ("why", "python", "code", "sentence"),
    [
        ("a Python with the package", sys.executable, 0, "kubectl valve"),
        ("a Python without it", "/bin/false", 1, "pip install valve"),
    ],
)
def test_the_starter_of_krew(why: str, python: str, code: int, sentence: str) -> None:
    environ = {**os.environ, "VALVE_PYTHON": python}
    done = subprocess.run([STARTER, "--help"], capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == code
    assert sentence in done.stdout + done.stderr
