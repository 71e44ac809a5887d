# SPDX-License-Identifier: Apache-2.0
"""The checked-in messages are what deviceplugin/proto says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3] / "deviceplugin"


def test_generated_files_are_up_to_date(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    checked_in = {path.name: path.read_text() for path in (ROOT / "valve_kubelet").glob("*_pb2.py*")}
    assert fresh == checked_in, "run python deviceplugin/generate.py"
