# SPDX-License-Identifier: Apache-2.0
"""A gate without a device, for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gate_bench import Bench

from valve_agent.gate import GateSettings


@pytest.fixture
def settings() -> GateSettings:
    """No cooldown and no grace: the gate opens as soon as nobody is busy."""
    return GateSettings(0, 0, 0, 0, lease_ns=60_000_000_000, kill_after_ns=50_000_000)


@pytest.fixture
def bench(settings: GateSettings) -> Iterator[Bench]:
    bench = Bench(settings)
    yield bench
    bench.close()
