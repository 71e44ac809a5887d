# SPDX-License-Identifier: Apache-2.0
"""The processes of a part as its main thread sees them: actors, an engine that turns busy, an observed page.

Threading model: the part's main thread. Made by rig.py, which also ends them.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ANSWER_S = 120.0


class RigError(Exception):
    """A process did not come up, or died."""


class ActorError(Exception):
    """The code that was sent to an actor raised; the message is its traceback."""


class Actor:
    """See actor.py. `tenant` actors run under libvalve."""

    def __init__(self, environment: dict[str, str], kernels: str, prefix: tuple[str, ...] = ()) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(ANSWER_S)
        command = [*prefix, sys.executable, "-S", str(HERE / "actor.py"), str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self.pid = self.process.pid
        self._kernels = kernels

    def cuda(self) -> Actor:
        """Make `cu` in it: a context on GPU 0."""
        self.run(f"cu = Cuda({self._kernels!r})")
        return self

    def start(self, code: str, fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self._socket, [textwrap.dedent(code).encode()], list(fds))

    def finish(self) -> Any:
        try:
            data, self.fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 8)
        except TimeoutError as error:
            raise RigError(f"process {self.pid} gave no answer within {ANSWER_S:.0f} s") from error
        if not data:
            raise RigError(f"process {self.pid} ended with {self.process.wait(10)}")
        answer = json.loads(data)
        if "error" in answer:
            raise ActorError(answer["error"])
        return answer["result"]

    def run(self, code: str, fds: tuple[int, ...] = ()) -> Any:
        self.start(code, fds)
        return self.finish()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self._socket.close()


class Watch:
    """A page that a kernel writes, and the observer that looks at it from outside."""

    def __init__(self, folder: Path, observer: Path | None) -> None:
        handle, name = tempfile.mkstemp(dir=folder)
        os.ftruncate(handle, 4096)
        self.path = name
        self._map = mmap.mmap(handle, 4096)
        os.close(handle)
        self._words = memoryview(self._map).cast("Q")
        self._process = subprocess.Popen([observer, name]) if observer else None

    @property
    def clock(self) -> int:
        """What the kernel last wrote: the GPU's clock."""
        return self._words[0]

    @property
    def slices(self) -> int:
        return self._words[1]

    @property
    def changed_ns(self) -> int:
        """When the observer last saw `clock` change (CLOCK_MONOTONIC)."""
        return self._words[128]

    def stands(self, for_s: float = 0.02) -> bool:
        """Whether the kernel makes no progress for a while from now."""
        before = self.clock
        time.sleep(for_s)
        return self.clock == before

    def advances(self, within_s: float = 10.0) -> bool:
        """Whether it moves, or begins to."""
        before, until = self.clock, time.monotonic() + within_s
        while self.clock == before:
            if time.monotonic() > until:
                return False
            time.sleep(0.0005)
        return True

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        self._words.release()
        self._map.close()
        Path(self.path).unlink()


class Online:
    """online.c: turns busy and idle through libvalve, as an engine does."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._read()

    def cycles(self, count: int) -> int:
        """So many preemptions; in how many of them the victim moved while the gate said paused."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"%d\n" % count)
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> int:
        assert self.process.stdout is not None
        data = self.process.stdout.read(8)
        if len(data) != 8:
            raise RigError(f"the online process ended with {self.process.wait(10)}")
        return int.from_bytes(data, "little")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
