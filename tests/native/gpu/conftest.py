# SPDX-License-Identifier: Apache-2.0
"""GPU nodes for tests: every test has a machine and an agent of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from gpu_node import NewNode, Node
from victims import build

import fakenv


@pytest.fixture
def new_node(fakenv_binaries: Path, bundle: Path, tmp_path: Path) -> Iterator[NewNode]:
    """new_node(machine={"branch": "535"}, route="agent"): a started node; ended with the test."""
    with ExitStack() as stack:

        def make(machine: dict[str, object] | None = None, **options: object) -> Node:
            made = stack.enter_context(fakenv.Machine(fakenv_binaries, **(machine or {})))  # type: ignore[arg-type]
            node = Node(made, tmp_path, bundle, **options)  # type: ignore[arg-type]
            stack.callback(node.close)
            return node.start()

        yield make


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What to preload for a libvalve under AddressSanitizer and UBSan."""
    out = tmp_path_factory.mktemp("sanitized")
    runtime = subprocess.run(
        [build.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).exists():
        pytest.skip("no AddressSanitizer runtime (libasan.so): install it with the C compiler")
    return f"{Path(runtime).resolve()}:{build.build(out, 'address')}"


@pytest.fixture
def node(new_node: NewNode) -> Node:
    return new_node()
