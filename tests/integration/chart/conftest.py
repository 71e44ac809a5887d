# SPDX-License-Identifier: Apache-2.0
"""A control plane of this folder's own: the chart's admission policies would judge the pods of others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helm_chart import install, uninstall

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.errors import MissingError


@pytest.fixture(scope="session")
def bare_plane() -> Iterator[ControlPlane]:
    """Nothing of Valve in it when a test begins; who installs also uninstalls."""
    try:
        plane = ControlPlane(controllers=True)
    except MissingError as error:
        pytest.skip(str(error))
    with plane:
        yield plane


@pytest.fixture(scope="module")
def installed(bare_plane: ControlPlane) -> Iterator[ControlPlane]:
    """The chart as `helm install` with no values leaves it; the kept CRDs go too."""
    install(bare_plane)
    yield bare_plane
    uninstall(bare_plane)
