# SPDX-License-Identifier: Apache-2.0
"""Starts the fake NVIDIA driver for tests, and programs under it.

A `Machine` is one supervisor: everything started through it sees the same GPUs. An `Actor` is a
Python process under a machine that executes what a test tells it, so that a test can be several
processes with several views of the driver. Not thread-safe; used by the tests' fixtures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
BRANCHES = ("535", "550", "560", "565", "570", "575", "580", "590", "595")
LAYOUTS = ("535", "550", "570", "575", "580", "595")
"""Branches that differ in what Valve uses."""
ACTOR = [HERE / name for name in ("actor.py", "driver_api.py", "rm.py")]
SOURCES = sorted([*HERE.glob("*.c"), *HERE.glob("*.h"), HERE / "Makefile", *ACTOR])


class FakeNvError(Exception):
    """The fake could not be built or started, or an actor's code raised."""


def build() -> Path:
    """Compiles the fake once per state of its sources; returns the folder with the binaries.

    Raises FakeNvError when it does not compile.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fakenv-{os.getuid()}-{digest}"
    if not folder.exists():
        fresh = Path(tempfile.mkdtemp(prefix=folder.name))
        command = ["make", "-C", str(HERE), "-j2", f"BUILD={fresh}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise FakeNvError(f"the fake driver does not compile: {' '.join(command)}\n{done.stderr}")
        for path in ACTOR:
            shutil.copy(path, fresh)
        fresh.chmod(0o755)  # tests run programs of it as another user, who may not enter the checkout
        with contextlib.suppress(OSError):  # someone else was first; theirs is the same
            fresh.rename(folder)
    return folder


def unavailable(folder: Path) -> str | None:
    """Why the fake cannot run here, or None."""
    probe = [str(folder / "fakenv"), "run", "--", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=False)
    return None if done.returncode == 0 else done.stderr.strip() or f"{probe[0]} ended with {done.returncode}"


class Machine:
    """One fake machine. `options` are those of `fakenv serve`, e.g. branch="535", gpus=2."""

    def __init__(self, folder: Path, **options: str | int | bool) -> None:
        self.folder = folder
        self._directory = tempfile.TemporaryDirectory(prefix="fakenv-")
        self.socket = Path(self._directory.name) / "control"
        words = []
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
        self._server = subprocess.Popen(
            [folder / "fakenv", "serve", "--socket", self.socket, *words], stdout=subprocess.PIPE, text=True
        )
        self._actors: list[Actor] = []
        assert self._server.stdout is not None
        if self._server.stdout.readline() != "ready\n":
            self.close()
            raise FakeNvError(f"fakenv serve {' '.join(words)} did not come up")

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for actor in self._actors:
            actor.close()
        self._server.terminate()
        self._server.wait(timeout=10)
        if self._server.stdout:
            self._server.stdout.close()
        self._directory.cleanup()

    def prefix(self) -> list[str]:
        """What to put before a command so that it runs on this machine."""
        return [str(self.folder / "fakenv"), "exec", "--socket", str(self.socket), "--"]

    def environment(self) -> dict[str, str]:
        """The environment in which the fake CUDA and NVML libraries are found."""
        return {**os.environ, "LD_LIBRARY_PATH": str(self.folder)}

    def actor(self, *prefix: str) -> Actor:
        """A new process on this machine; `prefix` goes before it, e.g. a program that drops privileges."""
        actor = Actor(self, prefix)
        self._actors.append(actor)
        return actor

    def ctl(self, *words: str | int) -> str:
        """One line of the control protocol; raises FakeNvError when it is not understood."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.connect(str(self.socket))
            s.settimeout(30)
            s.send(" ".join(str(word) for word in words).encode())
            answer = s.recv(1 << 20).decode()
        if answer.startswith("error"):
            raise FakeNvError(f"{words}: {answer}")
        return answer

    def status(self) -> dict[str, Any]:
        """The supervisor's model: files, clients, channels with their state, counters."""
        answer: dict[str, Any] = json.loads(self.ctl("status"))
        return answer


NewMachine = Callable[..., Machine]


class Actor:
    """A process that executes code. `run` returns the value of the variable `result`, JSON-encoded on
    the way; descriptors travel in `fds` (in) and in the variable `give` (out)."""

    def __init__(self, machine: Machine, prefix: tuple[str, ...]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(60)
        command = [*prefix, sys.executable, "-S", str(machine.folder / "actor.py"), str(theirs.fileno())]
        self.process = subprocess.Popen(
            ["sh", "-c", 'ulimit -c 0; exec "$0" "$@"', *machine.prefix(), *command],  # some die of SIGSEGV
            pass_fds=[theirs.fileno()],
            env=machine.environment(),
        )
        theirs.close()
        self.pid = self.process.pid

    def start(self, code: str, fds: tuple[int, ...] = ()) -> None:
        """Sends code without waiting for its end; `finish` collects the answer."""
        socket.send_fds(self._socket, [textwrap.dedent(code).encode()], list(fds))

    def finish(self) -> Any:
        data, self.fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 8)
        if not data:
            raise FakeNvError(f"the actor ended: {self.process.wait(timeout=10)}")
        answer = json.loads(data)
        if "error" in answer:
            raise FakeNvError(answer["error"])
        return answer["result"]

    def run(self, code: str, fds: tuple[int, ...] = ()) -> Any:
        self.start(code, fds)
        return self.finish()

    def close(self) -> None:
        """Ends the process, whatever state it is in, and reaps it."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)
        self._socket.close()
