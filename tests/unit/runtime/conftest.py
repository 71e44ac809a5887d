# SPDX-License-Identifier: Apache-2.0
"""valve_runtime is not in the installed distribution (it goes into pods): it is imported from its folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "runtime"))
