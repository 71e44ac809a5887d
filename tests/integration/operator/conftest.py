# SPDX-License-Identifier: Apache-2.0
"""A control plane of this folder's own, with the chart on it: the tests make nodes and take them away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from operator_rig import Installed

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.errors import MissingError


@pytest.fixture(scope="session")
def chart_on_a_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    try:
        plane = ControlPlane(controllers=True)
    except MissingError as error:
        pytest.skip(str(error))
    with plane:
        yield Installed(plane, tmp_path_factory.mktemp("operator"))


@pytest.fixture
def installed(chart_on_a_plane: Installed) -> Iterator[Installed]:
    """Without nodes and policies, before and after."""
    yield chart_on_a_plane
    chart_on_a_plane.clean()
