# SPDX-License-Identifier: Apache-2.0
"""`valve bench reclaim` measures what it says: memory in use, all of it, from offline to online."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_it_reports_what_it_took(runtime: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "valve_cli.main",
        "bench",
        "reclaim",
        "--json",
        "--mib",
        "16",
        "--cycles",
        "3",
    ]
    done = subprocess.run(
        [*command, "--runtime", str(runtime)], capture_output=True, text=True, timeout=120, check=True
    )
    report = json.loads(done.stdout)
    assert report["bytes_in_use"] == 3 * 16 << 20, "every slab that was taken had an owner"
    assert set(report["times_us"]) == {"total", "hold", "choose", "remap", "discard"}
    total, parts = report["times_us"]["total"], report["times_us"]
    assert total["p50"] <= total["p99"] <= total["max"]
    assert total["max"] >= max(parts[part]["p50"] for part in ("remap", "discard"))


def test_without_a_library_it_says_what_to_build(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "valve_cli.main",
        "bench",
        "reclaim",
        "--cycles",
        "1",
        "--runtime",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "make runtime" in done.stderr
