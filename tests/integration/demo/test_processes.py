# SPDX-License-Identifier: Apache-2.0
"""The demo's child processes: every one is taken down, every failure names its cause and its log."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from valve_cli.demo.errors import ProcessError
from valve_cli.demo.processes import Child, Tail, group_lives, last_words

FAMILY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
print("up", flush=True)
time.sleep(600)
"""


async def start(tmp_path: Path, program: str, stdin: bool = False) -> Child:
    command = [sys.executable, "-c", program]
    return await Child.start(
        "the subject", command, tmp_path / "log" / "subject.log", dict(os.environ), stdin
    )


async def until_it_says(child: Child, text: str) -> None:
    async with asyncio.timeout(30):
        while text not in child.log.read_text().partition("\n")[2]:
            await asyncio.sleep(0.02)


def test_stop_ends_a_family_that_ignores_sigterm_and_has_a_stopped_child(tmp_path: Path) -> None:
    async def story() -> None:
        child = await start(tmp_path, FAMILY.replace("'", '"'))
        await until_it_says(child, "\nup\n")
        assert group_lives(child.pid)
        await child.stop(grace_s=0.3)
        assert child.exited
        assert not group_lives(child.pid)

    asyncio.run(story())


def test_a_command_that_ends_is_reported_with_its_status_and_its_last_words(tmp_path: Path) -> None:
    async def story() -> None:
        child = await start(tmp_path, "import sys; print('fine'); raise SystemExit('ValueError: too small')")
        assert await child.wait(30) == 1
        with pytest.raises(
            ProcessError, match=r"the subject exited with 1: ValueError: too small.*subject\.log"
        ):
            child.check()

    asyncio.run(story())


def test_a_killed_command_is_reported_with_its_signal(tmp_path: Path) -> None:
    async def story() -> None:
        child = await start(tmp_path, "import time; time.sleep(600)")
        child.signal(signal.SIGKILL)
        await child.wait(30)
        with pytest.raises(ProcessError, match="killed by signal 9"):
            child.check()
        await child.stop()

    asyncio.run(story())


def test_a_command_that_does_not_exist_is_said_to_be_missing(tmp_path: Path) -> None:
    async def story() -> None:
        with pytest.raises(ProcessError, match=r"cannot start .*No such file"):
            await Child.start("it", [str(tmp_path / "none")], tmp_path / "log", {})

    asyncio.run(story())


def test_writing_to_a_command_that_has_ended_gives_its_cause(tmp_path: Path) -> None:
    async def story() -> None:
        child = await start(tmp_path, "raise SystemExit('RuntimeError: no model')", stdin=True)
        await child.wait(30)
        with pytest.raises(ProcessError, match="no model"):
            await child.write_line("x" * 1_000_000)  # more than a pipe holds

    asyncio.run(story())


def test_tail_gives_whole_lines_of_a_file_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "f"
    tail = Tail(path)
    assert tail.lines() == []
    with path.open("wb") as handle:
        for chunk, expected in ((b"one\ntw", [b"one"]), (b"o", []), (b"\nthree\n", [b"two", b"three"])):
            handle.write(chunk)
            handle.flush()
            assert tail.lines() == expected
    tail.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n\n", "b"),
        ("a\nOSError: disk full\nbye\n", "OSError: disk full"),
        ("", "it said nothing"),
    ],
    ids=["the last line", "the last error", "an empty log"],
)
def test_last_words(tmp_path: Path, text: str, expected: str) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    assert last_words(log) == expected
