# SPDX-License-Identifier: Apache-2.0
"""A real agent and real tenants for each test; everything that a test starts ends with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live import POLICY, SLAB_BYTES

from valve_cli.bench.rig import LiveAgent, LiveTenant


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[LiveAgent]:
    with LiveAgent(tmp_path, POLICY) as live:
        yield live


@pytest.fixture
def start(agent: LiveAgent, runtime: Path) -> Iterator[Callable[..., LiveTenant]]:
    """start("offline", "name", slabs=10): a tenant, attached, with an arena if `slabs` is given."""
    with contextlib.ExitStack() as stack:

        def begin(workload: str, name: str, slabs: int = 0, **options: Any) -> LiveTenant:
            tenant = stack.enter_context(LiveTenant(agent.socket, runtime, workload, name=name, **options))
            assert tenant.ask("attach", timeout_ms=15_000)["attached"], tenant.ask("state")
            if slabs:
                tenant.ask("arena", slabs=slabs, slab_bytes=SLAB_BYTES)
            return tenant

        yield begin
