# SPDX-License-Identifier: Apache-2.0
"""Victims in C and real gate processes; everything that a test starts ends with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gate_rig import SETTINGS, SLEEPERS, SPINNERS, Rig, Victim, end_process

from valve_cli.bench.preempt_rig import Counters, compile_c, start_victim, victim_command


@pytest.fixture(scope="session")
def victim_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c("victim", tmp_path_factory.mktemp("victim"))


@pytest.fixture
def start_victims(victim_binary: Path, tmp_path: Path) -> Iterator[Callable[..., Victim]]:
    """start_victims(leader="wait", barrier=True): a process with spinning and sleeping threads."""
    with contextlib.ExitStack() as stack:

        def start(leader: str = "wait", barrier: bool = True, binary: Path = victim_binary) -> Victim:
            counters = Counters(tmp_path / f"counters-{os.urandom(4).hex()}", SPINNERS)
            stack.callback(counters.close)
            process = start_victim(victim_command(binary, counters, SLEEPERS, barrier, leader))
            stack.callback(end_process, process)
            return Victim(process, counters, barrier)

        yield start


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(SETTINGS)
    yield rig
    rig.close()
