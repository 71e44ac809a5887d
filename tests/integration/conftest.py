# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes API for every folder of this lane that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.errors import MissingError

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT / "crds"


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """apiserver, etcd, controller manager and scheduler with Valve's CRDs; one for the whole session.

    Whoever makes objects in it removes them, or gives them names of its own.
    """
    try:
        plane = ControlPlane(controllers=True)
    except MissingError as error:
        pytest.skip(str(error))
    with plane:
        for path in sorted(CRDS.glob("*.yaml")):
            plane.kubectl.apply(path)
        plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        yield plane
