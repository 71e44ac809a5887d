# SPDX-License-Identifier: Apache-2.0
"""A control plane of this folder's own: the chart's admission policies would judge the pods of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helm_chart import install, uninstall

from e2e.cluster.control_plane import ControlPlane


@pytest.fixture(scope="session")
def bare_plane(new_plane: Callable[[Path], ControlPlane]) -> ControlPlane:
    """Nothing of Valve in it when a test begins; who installs also uninstalls."""
    return new_plane(Path(__file__).parent)


@pytest.fixture(scope="module")
def installed(bare_plane: ControlPlane) -> Iterator[ControlPlane]:
    """The chart as `helm install` with no values leaves it; the kept CRDs go too."""
    install(bare_plane)
    yield bare_plane
    uninstall(bare_plane)
