# SPDX-License-Identifier: Apache-2.0
"""`valve policy check`: the shipped examples are valid, a mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from valve_cli.main import main

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize(
    ("example", "says"),
    [("demo.yaml", "640 slabs of 2Mi"), ("policy.yaml", "its sizes follow each node's GPUs")],
)
def test_an_example_is_valid(example: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(EXAMPLES / example)]) == 0
    assert says in capsys.readouterr().out


def test_a_mistake_is_named_with_its_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text((EXAMPLES / "demo.yaml").read_text().replace("lease:", "leese:"))
    assert main(["policy", "check", str(file)]) == 2
    error = capsys.readouterr().err
    assert "spec.compute.leese" in error
    assert "lease" in error
