# SPDX-License-Identifier: Apache-2.0
"""The qualification's kernels, compiled by CUDA's own compiler (NVRTC, no GPU): for every architecture that
the channel control is for, and as the qualification needs them. The fake driver runs kernels of its own."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[3] / "e2e" / "gpu"
SOURCE = GPU / "qualification" / "kernels.cu"
PARAMETERS = {
    "nop": 0, "spin_us": 1, "timer_writer": 2, "store32": 2, "fill32": 3, "copy": 3, "touch_pages": 5,
    "checksum": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[bytes, str]]:
    """(cubin, PTX) by architecture."""
    sys.path.append(str(GPU))
    try:
        from qualification import nvrtc
        from qualification.record import Skip
    finally:
        sys.path.remove(str(GPU))
    for library in nvrtc.find():
        try:
            compiler = nvrtc.Nvrtc(library)
        except Skip:
            continue
        return {arch: compiler.compile(SOURCE, arch) for arch in ("sm_80", "sm_90", "sm_100", "sm_120")}
    if os.environ.get("CI"):
        pytest.fail("no NVRTC in this environment, and CI must compile the kernels: see constraints/dev.txt")
    pytest.skip("no NVRTC here: `make build/venv/ready` installs it")


def _entries(ptx: str) -> dict[str, str]:
    """The body of each kernel, by name."""
    return {
        found["name"]: found["all"]
        for found in re.finditer(r"(?P<all>\.visible \.entry (?P<name>\w+)\(.*?\n}\n)", ptx, re.DOTALL)
    }


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_they_compile(compiled: dict[str, tuple[bytes, str]], arch: str) -> None:
    cubin, ptx = compiled[arch]
    assert cubin.startswith(b"\x7fELF"), "cuModuleLoadData is given a cubin"
    entries = _entries(ptx)
    assert set(entries) == set(PARAMETERS), "names as in C, no other kernel"
    for name, count in PARAMETERS.items():
        assert re.findall(r"\.param (\.\w+)", entries[name].partition("{")[0]) == [".u64"] * count, name


def test_no_loop_is_optimised_away(compiled: dict[str, tuple[bytes, str]]) -> None:
    entries = _entries(compiled["sm_90"][1])
    for name in ("spin_us", "timer_writer"):
        assert entries[name].count("%globaltimer") >= 2, f"{name}: once to begin a slice, once to end it"
    for name in ("spin_us", "timer_writer", "fill32", "copy", "touch_pages", "checksum"):
        labels = re.findall(r"^(\$\w+):", entries[name], re.MULTILINE)
        back = [
            label
            for label in labels
            if entries[name].rfind(f"bra \t{label};") > entries[name].find(f"{label}:")
        ]
        assert back, f"{name} has a branch backwards"


def test_stores_leave_the_gpu_at_once(compiled: dict[str, tuple[bytes, str]]) -> None:
    entries = _entries(compiled["sm_90"][1])
    writer = entries["timer_writer"]
    assert re.search(r"st\.volatile\.global\.u64.*\n\s*(membar|fence)\S*\.sys", writer), writer
    assert "ld.volatile.global.u64" in entries["checksum"]
    assert "atom.global.sys.xor.b64" in entries["checksum"]
