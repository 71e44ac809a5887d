# SPDX-License-Identifier: Apache-2.0
"""A control plane of this folder's own, with the chart on it: the tests make nodes and take them away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from operator_rig import Installed

from e2e.cluster.control_plane import ControlPlane


@pytest.fixture(scope="session")
def chart_on_a_plane(
    new_plane: Callable[[Path], ControlPlane], tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    return Installed(new_plane(Path(__file__).parent), tmp_path_factory.mktemp("operator"))


@pytest.fixture
def installed(chart_on_a_plane: Installed) -> Iterator[Installed]:
    """Without nodes and policies, before and after."""
    yield chart_on_a_plane
    chart_on_a_plane.clean()
