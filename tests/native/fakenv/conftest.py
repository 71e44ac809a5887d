# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the fake driver's own tests: it is compiled once, every test has a machine of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fakenv"))
import fakenv

BRANCHES = ("535", "550", "570", "580", "595")
NewMachine = Callable[..., fakenv.Machine]


@pytest.fixture(scope="session")
def fakenv_binaries() -> Path:
    folder = fakenv.build()
    reason = fakenv.unavailable(folder)
    if reason:
        pytest.skip(f"the fake NVIDIA driver cannot run here: {reason}")
    return folder


@pytest.fixture
def new_machine(fakenv_binaries: Path) -> Iterator[NewMachine]:
    """Makes machines with options; all are gone at the end of the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(fakenv.Machine(fakenv_binaries, **options))


@pytest.fixture
def machine(new_machine: NewMachine) -> fakenv.Machine:
    return new_machine()
