# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of the nvidia device on the fake driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from memory_rig import Rig

import fakenv


@pytest.fixture
def new_rig(fakenv_binaries: Path, bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """new_rig(branch="580", slabs=8, ...): a machine, an agent, and everything ended at the end."""
    with ExitStack() as stack:

        def make(branch: str = "580", memory_mib: int = 64, **options: Any) -> Rig:
            machine = fakenv.Machine(fakenv_binaries, branch=branch, memory_mib=memory_mib)
            stack.enter_context(machine)
            return stack.enter_context(Rig(machine, bundle, tmp_path, **options))

        yield make


@pytest.fixture
def rig(new_rig: Callable[..., Rig]) -> Rig:
    return new_rig()
