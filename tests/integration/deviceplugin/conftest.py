# SPDX-License-Identifier: Apache-2.0
"""A real device plugin process between a fake kubelet and a fake agent; everything ends with its test."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from device_node import GPU_A, GPU_B, FakeAgent, Plugin
from fake_kubelet import FakeKubelet


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Short: a socket's path has 107 characters."""
    short = Path(f"/tmp/valve-dp-{os.getpid()}-{time.monotonic_ns()}")
    (short / "run").mkdir(parents=True)
    yield short
    (tmp_path / "plugin").symlink_to(short)  # for whoever looks at a failure before it is removed
    subprocess.run(["rm", "-rf", str(short)], check=True)


@pytest.fixture
def kubelet(folder: Path) -> Iterator[FakeKubelet]:
    made = FakeKubelet(folder / "kubelet")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def agent(folder: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(folder / "run" / "agent.sock")
    made.gpus = {GPU_A: (16, 12, 1), GPU_B: (16, 16, 0)}
    made.start()
    yield made
    made.stop()


@pytest.fixture
def plugin(folder: Path) -> Iterator[Plugin]:
    made = Plugin(folder)
    yield made
    status = made.stop()
    assert status == 0, made.log.read_text()


@pytest.fixture
def until() -> Callable[[Callable[[], bool], str], None]:
    def wait(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within 20 s"
            time.sleep(0.02)

    return wait
