# SPDX-License-Identifier: Apache-2.0
"""A live agent and live tenants, for benches and integration tests.

Why it exists: what is measured or tested must be what users run: `valve agent`, `valve run`, libvalve under
LD_PRELOAD. This starts them as processes, talks to them and ends what it started.

Threading model: one thread. Callers: reclaim.py, tests/integration/agent.

    RigError      a process did not do what it was told in time; the message carries its output
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from valve_cli.status import StatusError, read_status

TENANT = Path(__file__).with_name("tenant.py")
ANSWER_S = 60.0
"""Far longer than anything takes: only a broken run waits so long."""


class RigError(Exception):
    pass


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = ANSWER_S) -> Any:
    """Poll until `condition()` is true and return it. Raises RigError."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise RigError(f"waited {timeout_s} s for {what}")
        time.sleep(0.01)
    return result


class LiveAgent:
    """`valve agent` as a process. Use as a context manager."""

    def __init__(self, folder: Path, policy: str, *, arguments: tuple[str, ...] = ()) -> None:
        """`folder` holds socket, event log and output; `policy` is the YAML text."""
        self.folder = folder
        self.socket = folder / "agent.sock"
        self.events_path = folder / "events.jsonl"
        self.log_path = folder / "agent.log"
        self._policy = folder / "policy.yaml"
        self._policy.write_text(policy)
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def source(self) -> tuple[str, ...]:
        """The arguments that say where the settings come from."""
        return ("--policy", str(self._policy))

    def launch(self) -> None:
        """Start the process without waiting for it."""
        command = [
            sys.executable, "-m", "valve_cli.main", "agent", *self.source(), "--socket", str(self.socket),
            "--events", str(self.events_path), *self._arguments,
        ]  # fmt: skip
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start(self) -> None:
        self.launch()
        assert self._process is not None
        try:
            wait_for("the agent to listen", self._answers)
        except BaseException:
            if self._process.poll() is None:
                self._process.kill()
            self.wait()
            raise

    def stop(self) -> int:
        """SIGTERM and wait: the exit status."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.terminate()
        return self.wait()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self.wait()

    def wait(self) -> int:
        """Its exit status, once it has ended by itself."""
        assert self._process is not None
        try:
            status = self._process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise RigError(f"the agent did not end:\n{self.log_path.read_text()}") from None
        self._process = None
        return status

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RigError(f"the agent ended with {self._process.returncode}:\n{self.log_path.read_text()}")
        try:
            self.status()
        except StatusError:
            return False
        return True

    def status(self) -> dict[str, Any]:
        return read_status(self.socket)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Every event so far, or those of one name."""
        if not self.events_path.exists():
            return []
        whole, _, _ = self.events_path.read_text().rpartition("\n")  # the last line may be half written
        lines = whole.splitlines()
        found = [json.loads(line) for line in lines]
        return [event for event in found if name is None or event["event"] == name]

    def wait_event(self, name: str, after: int = 0, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The event of this name at index `after` among those of its name."""
        events = wait_for(f"event {name!r}", lambda: self.events(name)[after:], timeout_s)
        return dict(events[0])


class LiveTenant:
    """tenant.py under `valve run`. Use as a context manager."""

    def __init__(
        self,
        agent_socket: Path,
        runtime: Path,
        workload: str,
        *,
        name: str,
        memory: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [
            sys.executable, "-m", "valve_cli.main", "run", "--workload", workload, "--name", name, "--socket",
            str(agent_socket), "--runtime", str(runtime), *(["--memory", memory] if memory else []), "--",
            sys.executable, str(TENANT),
        ]  # fmt: skip
        self._spawn(name, command, {**os.environ, **(environment or {})})

    def _spawn(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._launcher = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def launcher_pid(self) -> int:
        return self._launcher.pid

    @property
    def pid(self) -> int:
        """The tenant process itself (the launcher's child)."""

        def child() -> int:
            path = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children")
            return int((path.read_text().split() or ["0"])[0])

        return int(wait_for(f"{self.name} to start", child))

    def ask(self, do: str, timeout_s: float = ANSWER_S, **fields: Any) -> dict[str, Any]:
        """One command, its answer. Raises RigError if there is none in time (a paused tenant cannot answer)
        or the tenant refuses."""
        self.tell(do, **fields)
        return self.answer(do, timeout_s)

    def tell(self, do: str, **fields: Any) -> None:
        assert self._launcher.stdin is not None
        self._launcher.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self._launcher.stdin.flush()

    def answer(self, do: str = "answer", timeout_s: float = ANSWER_S) -> dict[str, Any]:
        assert self._launcher.stdout is not None
        fd = self._launcher.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RigError(f"{self.name} did not answer {do!r} within {timeout_s} s")
            data = os.read(fd, 1 << 16)
            if not data:
                raise RigError(f"{self.name} ended during {do!r}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise RigError(f"{self.name}: {answer['error']}")
        return answer

    def kill(self) -> None:
        """kill -9 of the tenant process; the launcher ends by itself."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """The launcher's exit status, which is the tenant's."""
        return self._launcher.wait(ANSWER_S)

    def close(self) -> None:
        if self._launcher.poll() is None:
            # The launcher ends its subtree, paused processes too.
            children = (
                Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children").read_text().split()
            )
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            try:
                self._launcher.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self._launcher.kill()
                self._launcher.wait()
        for pipe in (self._launcher.stdin, self._launcher.stdout):
            assert pipe is not None
            pipe.close()
