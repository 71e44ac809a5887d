# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes API for every folder of this lane that asks for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.errors import MissingError

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NewPlane = Callable[[Path], ControlPlane]


@pytest.fixture(scope="session")
def new_plane(with_folder: Callable[[Path], ExitStack]) -> NewPlane:
    """new_plane(FOLDER): apiserver, etcd, controller manager and scheduler that end with the folder."""

    def start(folder: Path) -> ControlPlane:
        try:
            plane = with_folder(folder).enter_context(ControlPlane(controllers=True))
        except MissingError as error:
            pytest.skip(str(error))
        plane.kubectl.until("the default service account", ["sa", "default"], lambda _: True)
        return plane

    return start


@pytest.fixture(scope="session")
def control_plane(new_plane: NewPlane) -> ControlPlane:
    """With Valve's CRDs; one for the whole lane.

    Whoever makes objects in it removes them, or gives them names of its own.
    """
    plane = new_plane(FOLDER)
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        plane.kubectl.apply(path)
    plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    return plane
