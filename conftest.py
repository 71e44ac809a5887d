# SPDX-License-Identifier: Apache-2.0
"""Lanes: every test belongs to exactly one, by the folder it lives in, and the summary counts them.

A lane that cannot run is skipped with its reason on a user's machine and fails where CI=true, except
`gpu`, which exists only where there is a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
LANES = {
    "unit": "tests/unit",
    "native": "tests/native",
    "integration": "tests/integration",
    "engines": "tests/engines",
    "e2e": "e2e/scenarios",
    "gpu": "e2e/gpu",
}
CI = os.environ.get("CI") == "true"
counts: dict[str, Counter[str]] = {lane: Counter() for lane in LANES}
lane_of_item: dict[str, str] = {}
ending: dict[Path, ExitStack] = {}
"""What ends with a folder's last test; a later folder lies inside an earlier one or beside it."""


def lane_of(path: Path) -> str:
    """The lane of a test file; a test outside every lane is an error, never silently unrun."""
    relative = path.resolve().relative_to(ROOT).as_posix()
    for lane, folder in LANES.items():
        if relative.startswith(folder + "/"):
            return lane
    raise pytest.UsageError(f"{relative} belongs to no lane: put it under one of {', '.join(LANES.values())}")


def gpu_present() -> bool:
    return Path("/dev/nvidiactl").exists()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = list(LANES)
    kept, left_out = [], []
    for item in items:
        lane = lane_of(item.path)
        item.add_marker(lane)
        lane_of_item[item.nodeid] = lane
        (left_out if lane == "gpu" and not gpu_present() else kept).append(item)
    kept.sort(key=lambda item: order.index(lane_of_item[item.nodeid]))
    items[:] = kept
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The runtime bundle, built if need be; fails with the builder's sentence without a compiler."""
    out = ROOT / "build" / "runtime"
    command = [sys.executable, str(ROOT / "runtime" / "build.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"libvalve cannot be built: {done.stderr or done.stdout}")
    return out


@pytest.fixture(scope="session")
def with_folder() -> Callable[[Path], ExitStack]:
    """with_folder(FOLDER): what is put on this stack ends with the folder's last test.

    For what is shared by a folder's tests and keeps running: a session's fixture would outlive its lane, and
    an idle control plane disturbs the lanes that measure. Latest first, inner folders before outer ones.
    """
    return lambda folder: ending.setdefault(folder, ExitStack())


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    with ExitStack() as over:
        for folder in list(ending):
            if nextitem is None or not nextitem.path.is_relative_to(folder):
                over.push(ending.pop(folder))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = (
            f"CI=true allows no skipped test; the reason was: {call.excinfo and call.excinfo.value}"
        )
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    lane = lane_of_item.get(report.nodeid)
    if lane and (report.when == "call" or report.outcome != "passed"):
        counts[lane][report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("tests per lane")
    for lane, counter in counts.items():
        if not any(counter.values()) and lane != "gpu":
            continue
        note = "" if lane != "gpu" or gpu_present() else " (no /dev/nvidiactl on this machine)"
        tally = ", ".join(f"{counter[outcome]:4} {outcome}" for outcome in ("passed", "failed", "skipped"))
        terminalreporter.line(f"{lane:12} {tally}{note}")
