# SPDX-License-Identifier: Apache-2.0
"""Child processes of the demo: started in their own group, logged, always taken down.

A `Child` is one command and everything it spawns.  Stopping is: SIGCONT (it may be
stopped), SIGTERM to the group, a grace period, SIGKILL to the group, and the leader
reaped.  Single asyncio loop; called by `engines.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from valve_cli.demo.errors import ProcessError

TAIL_BYTES = 20_000


class Child:
    """A running command.  Make one with `Child.start`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], log: Path, env: dict[str, str], stdin: bool = False
    ) -> Child:
        """Start `command` as leader of a new session; stdout and stderr go to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            sink.write(f"$ {' '.join(command)}\n".encode())
            sink.flush()
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
                    stdout=sink,
                    stderr=asyncio.subprocess.STDOUT,
                    env=env,
                    start_new_session=True,
                )
            except OSError as error:
                raise ProcessError(f"cannot start {command[0]}: {error.strerror}") from error
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exited(self) -> bool:
        return self._process.returncode is not None

    def check(self) -> None:
        """Raise ProcessError, with the log's last words, if the command has ended."""
        if self.exited:
            raise ProcessError(f"{self._ended()}: {last_words(self.log)}", self.log)

    def _ended(self) -> str:
        code = self._process.returncode
        return (
            f"{self.name} was killed by signal {-code}"
            if code and code < 0
            else f"{self.name} exited with {code}"
        )

    def bind(self, comm: str, core: int) -> None:
        """Bind the main thread of the group's process of this name (/proc/PID/comm) to a core; its other
        threads stay where they are.  Raises ProcessError if there is no such process."""
        bound = [pid for pid in group_members(self.pid) if comm_of(pid) == comm]
        for pid in bound:
            os.sched_setaffinity(pid, {core})
        if not bound:
            raise ProcessError(f"{self.name} has no process called {comm}", self.log)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group; a group that is gone needs none."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    async def write_line(self, text: str) -> None:
        """One line to the command's stdin.  Raises ProcessError if nobody reads it any more."""
        stream = self._process.stdin
        assert stream is not None, "started without stdin"
        try:
            stream.write(text.encode() + b"\n")
            await stream.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            await asyncio.sleep(0.2)  # let the exit status arrive: it says more than the pipe
            self.check()
            raise ProcessError(f"{self.name} no longer reads its commands", self.log) from error

    async def wait(self, timeout_s: float) -> int | None:
        """Exit status, or None if it still runs after `timeout_s`."""
        try:
            return await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            return None

    async def stop(self, grace_s: float = 10.0) -> None:
        """End the whole group; returns when the leader is reaped and no member is left."""
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            self.signal(signal.SIGCONT)
            self.signal(number)
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline:
                if self.exited and not group_lives(self.pid):
                    return
                await asyncio.sleep(0.05)
        if not self.exited:
            raise ProcessError(f"{self.name} (pid {self.pid}) did not die of SIGKILL", self.log)


def group_lives(group: int) -> bool:
    """Whether any process of this group is left (a zombie nobody reaped counts as gone)."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return bool(group_members(group))


def group_members(group: int) -> list[int]:
    """Pids of the living processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


def comm_of(pid: int) -> str:
    """A process's name, at most 15 characters; "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def last_words(log: Path) -> str:
    """The line of a log that most likely names the cause: the last with an error, else the last."""
    with log.open("rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - TAIL_BYTES))
        lines = [line.strip() for line in handle.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error:" in line]
    return (telling or lines or ["it said nothing"])[-1][-400:]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Tail:
    """Reads whole new lines of a growing file.  The file may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: IO[bytes] | None = None
        self._partial = b""

    def lines(self) -> list[bytes]:
        if self._handle is None:
            if not self._path.exists():
                return []
            self._handle = self._path.open("rb")
        *whole, self._partial = (self._partial + self._handle.read()).split(b"\n")
        return whole

    def close(self) -> None:
        if self._handle:
            self._handle.close()
            self._handle = None
