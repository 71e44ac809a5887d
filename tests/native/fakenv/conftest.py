# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the fake driver's own tests: it is compiled once, every test has a machine of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fakenv"))
import fakenv


@pytest.fixture(scope="session")
def fakenv_binaries() -> Path:
    missing = [tool for tool in ("cc", "make") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"the fake NVIDIA driver is compiled for these tests: {' and '.join(missing)} not found")
    folder = fakenv.build()
    reason = fakenv.unavailable(folder)
    if reason:
        pytest.skip(f"the fake NVIDIA driver cannot run here: {reason}")
    return folder


@pytest.fixture
def new_machine(fakenv_binaries: Path) -> Iterator[fakenv.NewMachine]:
    """Makes machines with options; all are gone at the end of the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(fakenv.Machine(fakenv_binaries, **options))


@pytest.fixture
def machine(new_machine: fakenv.NewMachine) -> fakenv.Machine:
    return new_machine()
