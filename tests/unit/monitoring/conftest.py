# SPDX-License-Identifier: Apache-2.0
"""promtool, and the folders that are not in the installed distribution."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
for folder in ("tools", "charts"):
    sys.path.insert(0, str(ROOT / folder))

import get_prometheus  # noqa: E402


@pytest.fixture(scope="session")
def promtool() -> Path:
    try:
        return get_prometheus.folder(get_prometheus.default_cache()) / "promtool"
    except get_prometheus.NoPrometheus as error:
        pytest.skip(str(error))
