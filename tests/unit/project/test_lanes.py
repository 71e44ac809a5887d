# SPDX-License-Identifier: Apache-2.0
"""The lane list is the same wherever it is written: conftest, pytest markers, Makefile."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LANES = ["unit", "native", "integration", "engines", "e2e", "gpu"]


def markers() -> list[str]:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    return [marker.split(":")[0] for marker in options["markers"]]


def make_targets() -> list[str]:
    return re.findall(r"^(\w+):.*## tests:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def conftest_lanes() -> list[str]:
    body = re.search(r"^LANES = \{(.*?)^\}", (ROOT / "conftest.py").read_text(), re.MULTILINE | re.DOTALL)
    assert body
    return re.findall(r'"(\w+)":', body.group(1))


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("pytest markers", markers()),
        ("Makefile targets", make_targets()),
        ("conftest.LANES", conftest_lanes()),
    ],
)
def test_every_list_of_lanes_is_the_same(where: str, found: list[str]) -> None:
    assert found == LANES, f"{where} lists {found}"


def test_every_test_file_lies_in_a_lane() -> None:
    folders = ("tests/unit", "tests/native", "tests/integration", "tests/engines", "e2e/scenarios", "e2e/gpu")
    strays = [
        path.relative_to(ROOT).as_posix()
        for top in ("tests", "e2e")
        for path in (ROOT / top).rglob("test_*.py")
        if not path.relative_to(ROOT).as_posix().startswith(tuple(f"{folder}/" for folder in folders))
    ]
    assert strays == []
