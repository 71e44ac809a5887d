# SPDX-License-Identifier: Apache-2.0
"""What the report says about where it was made: machine, versions, commit.

Reads /proc and asks git; a fact that cannot be had is said to be unknown.  Called by `main.py`.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from valve_cli.demo.report import Machine, Versions

UNKNOWN = "unknown"


def machine() -> Machine:
    """CPU model, the cores this process may use, and physical memory."""
    model = UNKNOWN
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(cpu=model, cores=len(os.sched_getaffinity(0)), memory_bytes=pages)


def versions(vllm: str, torch: str) -> Versions:
    try:
        own = version("valve")
    except PackageNotFoundError:
        own = UNKNOWN
    return Versions(
        valve=own,
        commit=commit(Path(__file__).parent),
        python=platform.python_version(),
        vllm=vllm or UNKNOWN,
        torch=torch or UNKNOWN,
        kernel=platform.release(),
    )


def commit(folder: Path) -> str:
    """The commit of the checkout the code runs from, with `+changes` if it was edited since."""
    try:
        run = subprocess.run(
            [
                "git",
                "-C",
                str(folder),
                "describe",
                "--always",
                "--abbrev=12",
                "--exclude=*",
                "--dirty=+changes",
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    return run.stdout.strip() or UNKNOWN
