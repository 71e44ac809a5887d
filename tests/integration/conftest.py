# SPDX-License-Identifier: Apache-2.0
"""A real Kubernetes API for every folder of this lane that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.errors import MissingError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent
CRDS = ROOT / "crds"
started = ExitStack()
"""Ends with the lane's last test: an idle apiserver would disturb the lanes that measure."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or not nextitem.path.is_relative_to(FOLDER):
        started.close()


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """apiserver, etcd, controller manager and scheduler with Valve's CRDs; one for the whole session.

    Whoever makes objects in it removes them, or gives them names of its own.
    """
    try:
        plane = ControlPlane(controllers=True)
    except MissingError as error:
        pytest.skip(str(error))
    started.callback(plane.close)
    with plane:
        for path in sorted(CRDS.glob("*.yaml")):
            plane.kubectl.apply(path)
        plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        yield plane
