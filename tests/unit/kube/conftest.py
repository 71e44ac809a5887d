# SPDX-License-Identifier: Apache-2.0
"""The kubelet stand-in is shared by the unit and the integration lane."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kubelet"))
