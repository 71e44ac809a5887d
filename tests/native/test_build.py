# SPDX-License-Identifier: Apache-2.0
"""runtime/build.py: what it makes, when it does nothing, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from victims import build

SCRIPT = build.RUNTIME / "build.py"


def run(out: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, "--out", out, *arguments],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("an empty PATH", {"PATH": ""}),
        ("a PATH without one", {"PATH": "/nonexistent"}),
        ("a CC that does not exist", {"PATH": "/nonexistent", "CC": "my-cc"}),
    ],
)
def test_a_missing_compiler_is_one_sentence_that_helps(
    tmp_path: Path, what: str, more: dict[str, str]
) -> None:
    done = run(tmp_path / "out", **more)
    assert done.returncode == 2, what
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no C compiler found: install one (Debian, Ubuntu: `apt-get install gcc libc6-dev`)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_compiler_shows_its_command(tmp_path: Path) -> None:
    done = run(tmp_path / "out", CC="/bin/false")
    assert done.returncode == 2
    assert "/bin/false" in done.stderr
    assert "failed:" in done.stderr
    assert list((tmp_path / "out" / "lib").iterdir()) == [], "nothing half made stays"


def test_it_builds_once(bundle: Path) -> None:
    library = bundle / "lib" / f"libvalve-{build.version()}.so"
    before = library.stat()
    done = run(bundle)
    assert (done.returncode, done.stdout) == (0, f"{library}\n")
    after = library.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_running_process_keeps_the_file_it_has_mapped(tmp_path: Path) -> None:
    library = build.build(tmp_path)
    with library.open("rb") as held:
        content = held.read()
        (tmp_path / "built-from").write_text("something else")
        build.build(tmp_path)
        assert library.stat().st_ino != os.fstat(held.fileno()).st_ino, "it was overwritten in place"
        held.seek(0)
        assert held.read() == content
    assert [path.name for path in (tmp_path / "lib").iterdir()] == [library.name]


def test_engines_find_the_plugins(bundle: Path) -> None:
    code = (
        "from importlib.metadata import entry_points, version\n"
        "(point,) = entry_points(group='vllm.general_plugins')\n"
        "print(point.name, point.value, version('valve-runtime'))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": str(bundle / "python")},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout == f"valve valve_runtime.vllm:register {build.version()}\n"


INTERPOSED = {
    "close", "close_range", "closefrom", "dlsym", "dup", "dup2", "dup3", "fcntl", "fcntl64", "ioctl", "open",
    "open64", "openat", "openat64",
    "cuGraphLaunch", "cuGraphLaunch_ptsz", "cuLaunch", "cuLaunchCooperativeKernel",
    "cuLaunchCooperativeKernelMultiDevice", "cuLaunchCooperativeKernel_ptsz", "cuLaunchGrid",
    "cuLaunchGridAsync", "cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchKernelEx_ptsz", "cuLaunchKernel_ptsz",
    "cuArray3DCreate_v2", "cuArrayCreate_v2", "cuArrayDestroy", "cuDevicePrimaryCtxReset",
    "cuDevicePrimaryCtxReset_v2", "cuDeviceTotalMem_v2", "cuMemAllocAsync",
    "cuMemAllocAsync_ptsz", "cuMemAllocFromPoolAsync", "cuMemAllocFromPoolAsync_ptsz", "cuMemAllocManaged",
    "cuMemAllocPitch_v2", "cuMemAlloc_v2", "cuMemCreate", "cuMemFreeAsync", "cuMemFreeAsync_ptsz",
    "cuMemFree_v2", "cuMemGetInfo_v2", "cuMemImportFromShareableHandle", "cuMemMap", "cuMemRelease",
    "cuMemRetainAllocationHandle", "cuMemUnmap", "cuMipmappedArrayCreate", "cuMipmappedArrayDestroy",
}  # fmt: skip
"""Functions that the library stands in front of, to see what a process does with a GPU."""


def test_the_library_shows_its_api_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    """And needs nothing but libc."""
    import re
    import shutil

    library = bundle / "lib" / f"libvalve-{build.version()}.so"
    header = (build.NATIVE / "include" / "valve.h").read_text()
    declared = set(re.findall(r"^VALVE_API .*?(valve_\w+)\(", header, re.M))
    nm, readelf = shutil.which("nm"), shutil.which("readelf")
    if nm is None or readelf is None:
        pytest.skip("no nm and readelf: install binutils")
    symbols = subprocess.run(
        [nm, "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    shown = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert shown - declared == INTERPOSED
    assert declared <= shown
    dynamic = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"NEEDED.*\[(.*)\]", dynamic) == ["libc.so.6"]
    assert "BIND_NOW" in dynamic, "lazy binding would run libc's resolver in the helper"
