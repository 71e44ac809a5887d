# SPDX-License-Identifier: Apache-2.0
"""libvalve against a million frames and a hundred thousand packets from a broken agent, sanitized."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from victims import HERE, build, compile_program, sanitizer_environment, unrandomized

FRAMES, PACKETS = 1_500_000, 100_000


@pytest.mark.parametrize("seed", [1])
def test_the_frame_parser_and_the_control_loop(tmp_path: Path, seed: int) -> None:
    others = [str(source) for source in build.sources() if source.name != "control.c"]
    program = compile_program(tmp_path / "fuzz", HERE / "fuzz.c", *others, sanitize="address")
    done = subprocess.run(
        unrandomized([str(program), str(seed), str(FRAMES), str(PACKETS)]),
        env={**os.environ, **sanitizer_environment()},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr
    words = done.stdout.split()
    counts = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert counts["frames"] == FRAMES
    assert 0.05 * FRAMES < counts["accepted"] < 0.9 * FRAMES, "the fuzzer must reach both sides of the parser"
    assert 0.05 * PACKETS < counts["kept"] < 0.95 * PACKETS
    assert counts["events"] > 1000, "grants and losses really happened"


def test_the_fuzzer_would_notice(tmp_path: Path) -> None:
    """A parser that trusts the sizes it is told is caught: the check has power."""
    frame = (build.NATIVE / "src" / "frame.c").read_text()
    careless = frame.replace("if (size < want || header.size < want)", "if (header.size < want)")
    assert careless != frame
    (tmp_path / "frame.c").write_text(careless)
    others = [str(source) for source in build.sources() if source.name not in ("control.c", "frame.c")]
    program = compile_program(
        tmp_path / "fuzz", HERE / "fuzz.c", str(tmp_path / "frame.c"), *others, sanitize="address"
    )
    done = subprocess.run(
        unrandomized([str(program), "1", "100000", "0"]),
        env={**os.environ, **sanitizer_environment()},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=100,
        check=False,
    )
    assert done.returncode == 99
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
