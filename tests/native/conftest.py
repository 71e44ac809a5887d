# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the native lane: the library, the victims and the fake NVIDIA driver, each compiled once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from fake_agent import FakeAgent
from victims import Victim, build, compile_victim, sanitizer_environment, unrandomized

sys.path.insert(0, str(Path(__file__).parents[1] / "fakenv"))
import fakenv

Start = Callable[..., Victim]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that runtime/build.py makes, of its own so that no other lane is disturbed."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("runtime")
    build.build(out)
    return out


@pytest.fixture(scope="session")
def library(bundle: Path) -> Path:
    return bundle / "lib" / f"libvalve-{build.version()}.so"


@pytest.fixture(scope="session")
def victim_of(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compile a variant of victim.c at its first use."""
    folder = tmp_path_factory.mktemp("victims")

    @cache
    def compiled(variant: str) -> Path:
        return compile_victim(folder, variant, library)

    return compiled


@pytest.fixture(scope="session")
def fakenv_binaries() -> Path:
    """The fake NVIDIA driver, compiled once."""
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
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(tmp_path / "agent.sock")
    yield fake
    fake.close()
    os.close(fake.doorbell)


@pytest.fixture(params=["plain", "address"])
def variant(request: pytest.FixtureRequest) -> str:
    """Tests that use it run against the library that ships and against the sanitized one."""
    return str(request.param)


@pytest.fixture
def start(
    library: Path, victim_of: Callable[[str], Path], agent: FakeAgent, tmp_path: Path
) -> Iterator[Start]:
    """start(role, variant="plain", arguments=(), **environment) -> Victim; ended and checked afterwards."""
    started: list[Victim] = []

    def launch(
        role: str,
        variant: str = "plain",
        arguments: tuple[str, ...] = (),
        stderr: int | None = None,
        **more: str,
    ) -> Victim:
        environment = {
            **os.environ,
            **sanitizer_environment(),
            "VALVE_SOCKET": str(agent.path),
            "VALVE_WORKLOAD": role,
            **more,
        }
        command = [str(victim_of(variant)), *arguments]
        if variant == "plain":
            environment["LD_PRELOAD"] = str(library)
        else:
            command = unrandomized(command)
        victim = Victim(command, environment, tmp_path / f"stderr-{len(started)}", stderr)
        started.append(victim)
        return victim

    yield launch
    for victim in started:
        victim.kill()
    for victim in started:
        text = victim.stderr()
        for word in ("AddressSanitizer", "runtime error:", "ThreadSanitizer"):
            assert word not in text, text
