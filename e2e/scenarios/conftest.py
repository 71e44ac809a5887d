# SPDX-License-Identifier: Apache-2.0
"""What every scenario needs: the engines, the model and the runtime that `make e2e` builds."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _built() -> None:
    for path in ("build/engines/bin/python", "build/model/config.json", "build/runtime/lib"):
        if not (ROOT / path).exists():
            pytest.skip(f"{path} is missing: run `make e2e`, which builds it")
