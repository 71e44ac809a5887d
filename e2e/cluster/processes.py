# SPDX-License-Identifier: Apache-2.0
"""Starting, watching and stopping a cluster's processes from a test.

`Supervisor` is the test's end of supervisor.py; `Program` is one process that it runs. A program's output
goes to a log file, and every failure to become ready carries that file's tail. One lock per supervisor, so
that tests may use it from several threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from e2e.cluster.errors import ClusterError, MissingError, StartError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
POLL_S = 0.02
CLOSE_S = 120
"""For the end of every process and the removal of a cluster's files: half a gigabyte, on a busy machine."""
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
"""What programs of the cluster see: nothing of the test's own environment."""


def tail(path: Path, lines: int = 30, width: int | None = None) -> str:
    if not path.exists():
        return "(no log)"
    return "\n".join(line[:width] for line in path.read_text(errors="replace").splitlines()[-lines:])


def wait_for(what: str, ready: Callable[[], bool], timeout_s: float) -> None:
    """Poll until `ready`. Raises StartError."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise StartError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(POLL_S)


class Supervisor:
    """Owns processes; `close` (or the death of this process) ends all of them and removes what they left."""

    def __init__(
        self,
        logs: Path,
        *,
        isolate: bool = False,
        binds: Sequence[tuple[Path, str]] = (),
        overlays: Sequence[tuple[Path, str]] = (),
        remove: Path | None = None,
        cgroup: str = "",
    ) -> None:
        """Raises MissingError where namespaces are wanted and this user may not make them."""
        if isolate and os.geteuid() != 0:
            raise MissingError("a cluster with nodes needs root (namespaces, mounts): run the tests as root")
        self.logs = logs
        self.isolated = isolate
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", "-S", str(SUPERVISOR)]
        command += ["--isolate"] if isolate else []
        command += [f"--bind={source}:{target}" for source, target in binds]
        command += [f"--overlay={folder}:{target}" for folder, target in overlays]
        command += [f"--remove={remove}"] if remove else []
        command += [f"--cgroup={cgroup}"] if cgroup else []
        self._errors = logs / "supervisor.log"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True,
            )  # fmt: skip
        self._lock = threading.Lock()
        self.pid = int(self._receive()["pid"])
        """Init's PID; its /proc/PID/ns names the namespaces."""

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise StartError(f"the cluster's supervisor ended:\n{tail(self._errors)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ClusterError(f"the cluster's supervisor could not do it: {reply['error']}")
        return reply

    def request(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._receive()

    def start(
        self, name: str, argv: Sequence[str | Path], environment: dict[str, str] | None = None
    ) -> Program:
        return Program(self, name, [str(word) for word in argv], ENVIRONMENT | (environment or {}))

    def run(self, argv: Sequence[str | Path], timeout_s: float = 60) -> str:
        """Run a short command inside and return what it printed. Raises ClusterError when it fails."""
        program = self.start(f"run-{Path(argv[0]).name}", argv)
        code = program.wait(timeout_s)
        output = program.log.read_text(errors="replace")
        program.log.unlink()
        if code != 0:
            raise ClusterError(f"{' '.join(map(str, argv))} ended with {code}:\n{output[-4000:]}")
        return output

    def close(self) -> None:
        """End every process and wait until nothing is left. Raises ClusterError if something is."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe and not pipe.closed:
                pipe.close()
        try:
            code = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            code = self._process.wait(CLOSE_S)
        if code and self._errors.exists():
            raise ClusterError(f"the cluster did not end cleanly ({code}):\n{tail(self._errors)}")


class Program:
    """One running process of a supervisor."""

    def __init__(self, owner: Supervisor, name: str, argv: list[str], environment: dict[str, str]) -> None:
        self.name, self.argv, self.environment = name, argv, environment
        self._owner = owner
        self.log = owner.logs / f"{name}.log"
        reply = owner.request(op="spawn", argv=argv, env=environment, log=str(self.log))
        self.pid = int(reply["pid"])
        """As the supervisor's PID namespace counts."""

    def returncode(self) -> int | None:
        code: int | None = self._owner.request(op="poll", pid=self.pid)["returncode"]
        return code

    def signal(self, number: int, *, group: bool = False) -> None:
        self._owner.request(op="signal", pid=self.pid, signal=int(number), group=group)

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Raises StartError after `timeout_s`, leaving it running."""
        deadline = time.monotonic() + timeout_s
        while (code := self.returncode()) is None:
            if time.monotonic() > deadline:
                raise StartError(f"{self.name} did not end within {timeout_s:.0f} s:\n{tail(self.log)}")
            time.sleep(POLL_S)
        return code

    def stop(self, timeout_s: float = 20) -> None:
        """SIGTERM, and SIGKILL if it will not end."""
        self.signal(signal.SIGTERM)
        try:
            self.wait(timeout_s)
        except StartError:
            self.kill()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(10)

    def restart(self) -> None:
        """Start it again with the same command; it must have ended."""
        reply = self._owner.request(op="spawn", argv=self.argv, env=self.environment, log=str(self.log))
        self.pid = int(reply["pid"])

    def until(self, what: str, ready: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait for readiness; fails at once when the process ends. Raises StartError with its log."""

        ended: list[int] = []

        def ended_or_ready() -> bool:
            if (code := self.returncode()) is not None:
                ended.append(code)
            return bool(ended) or ready()

        try:
            wait_for(f"{self.name}: {what}", ended_or_ready, timeout_s)
        except StartError as error:
            raise StartError(f"{error}\n{tail(self.log)}") from None
        if ended:
            raise StartError(f"{self.name} ended with {ended[0]} before {what}:\n{tail(self.log)}")
