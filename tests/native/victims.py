# SPDX-License-Identifier: Apache-2.0
"""Small tenant processes for the native lane: how they are compiled, started, asked and ended.

Variants: `plain` preloads the library that ships; `address` and `thread` are the same program with
libvalve's sources compiled in under sanitizers, which is the only way to instrument a constructor.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "runtime"))
import build as build

HERE = Path(__file__).parent
WAIT_S = 20.0


def compile_program(target: Path, source: Path, *extra: str, sanitize: str | None = None) -> Path:
    """Compile a test program against libvalve's headers. Raises CalledProcessError."""
    include = f"-I{build.NATIVE / 'src'}"
    command = [build.compiler(), *build.flags(sanitize), include, "-o", str(target), str(source), *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def compile_victim(folder: Path, variant: str, library: Path) -> Path:
    source, target = HERE / "victim.c", folder / f"victim-{variant}"
    if variant == "plain":
        return compile_program(target, source, str(library))  # needed by its path, which LD_PRELOAD names too
    return compile_program(target, source, *map(str, build.sources()), sanitize=variant)


def sanitizer_environment() -> dict[str, str]:
    return {
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "TSAN_OPTIONS": "exitcode=99:halt_on_error=0",
    }


def unrandomized(command: list[str]) -> list[str]:
    """Sanitizers of this age cannot live with 32 bits of address space randomization."""
    setarch = shutil.which("setarch")
    return [setarch, "-R", *command] if setarch else command


def state(pid: int) -> str:
    """R, S, T, Z, ... of the process's leader; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.002)


class Victim:
    """A started victim. `ask` sends a command and returns its answer."""

    def __init__(
        self, command: list[str], environment: dict[str, str], log: Path, stderr: int | None = None
    ) -> None:
        """Its stderr goes to `log`, or to the descriptor `stderr`."""
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file if stderr is None else stderr,
            )
        self.pid = self.process.pid
        self._pending = b""

    def line(self) -> str:
        """Its next line. The test fails if none comes."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + WAIT_S
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            assert left > 0, f"the victim is silent; its stderr: {self.stderr()}"
            if select.select([self.process.stdout], [], [], left)[0]:
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, f"the victim has ended; its stderr: {self.stderr()}"
                self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def silent_for(self, seconds: float) -> bool:
        """Whether it says nothing for that long."""
        assert self.process.stdout is not None
        if not self._pending and select.select([self.process.stdout], [], [], seconds)[0]:
            self._pending += os.read(self.process.stdout.fileno(), 65536)  # nothing: it has ended
        return not self._pending

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> str:
        self.tell(command)
        return self.line()

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self.wait_stopped()

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def is_stopped(self) -> bool:
        return state(self.pid) == "T"

    def wait_stopped(self) -> None:
        wait_until(self.is_stopped, "the victim is stopped")

    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_said(self, text: str) -> None:
        wait_until(lambda: text in self.stderr(), f"{text!r} on stderr; there is: {self.stderr()}")

    def helper(self) -> int:
        """Pid of its address-space helper."""
        found = [
            child
            for child in children(self.pid)
            if Path(f"/proc/{child}/comm").read_text() == "valve-helper\n"
        ]
        assert len(found) == 1, found
        return found[0]

    def end(self) -> int:
        """Close its stdin and wait; its exit status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(WAIT_S)
        self.process.stdout.close()
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
