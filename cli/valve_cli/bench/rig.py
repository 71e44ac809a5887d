# SPDX-License-Identifier: Apache-2.0
"""A live agent and live tenants, for benches and integration tests.

Why it exists: what is measured or tested must be what users run: `valve agent`, `valve run`, libvalve under
LD_PRELOAD. This starts them as processes, talks to them and ends what it started.

Threading model: one thread. Callers: reclaim.py, the demo, tests/integration/agent and others.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
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


class JsonChild:
    """A process that is told what to do and answers, one JSON object a line, by stdin and stdout.

    Use as a context manager. log: where its stderr goes, shown when it fails; default: ours.
    """

    answer_s = ANSWER_S

    def __init__(
        self, name: str, command: list[str], environment: Mapping[str, str], log: Path | None = None
    ) -> None:
        self.name = name
        self._log = log
        with log.open("ab") if log else nullcontext() as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=dict(environment)
            )
        self._buffer = b""
        self._told = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, do: str, **fields: Any) -> None:
        assert self._process.stdin is not None
        self._told = f" after {do!r}"
        self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self._process.stdin.flush()

    def answered(self, timeout_s: float) -> dict[str, Any] | None:
        """The next answer, or None if there is none in time. Raises RigError if the process ended."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(fd, 1 << 20)
            if not data:
                raise RigError(f"{self.name} ended{self._told}{self._said()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def answer(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Raises RigError if there is none in time: a paused process cannot answer."""
        wait_s = self.answer_s if timeout_s is None else timeout_s
        found = self.answered(wait_s)
        if found is None:
            raise RigError(f"{self.name} did not answer within {wait_s} s{self._told}{self._said()}")
        return found

    def ask(self, do: str, timeout_s: float | None = None, **fields: Any) -> dict[str, Any]:
        """One command, its answer. Raises RigError."""
        self.tell(do, **fields)
        return self.answer(timeout_s)

    def wait(self) -> int:
        """The exit status."""
        return self._process.wait(ANSWER_S)

    def close(self) -> None:
        self.end()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def end(self) -> None:
        """Make it end, and wait for that."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _said(self) -> str:
        return f":\n{self._log.read_text()[-4000:]}" if self._log else ""


class TenantProcess(JsonChild):
    """tenant.py, however it was started."""

    def answer(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Raises RigError as well if the tenant refuses."""
        found = super().answer(timeout_s)
        if not found.pop("ok"):
            raise RigError(f"{self.name}: {found['error']}")
        return found

    def kill(self) -> None:
        """kill -9 of the tenant itself; a launcher ends by itself."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


class LiveTenant(TenantProcess):
    """tenant.py under `valve run`."""

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
        options = ["--memory", memory] if memory else []
        command = valve_run(agent_socket, runtime, workload, name, [sys.executable, str(TENANT)], options)
        super().__init__(name, command, {**os.environ, **(environment or {})})

    @property
    def launcher_pid(self) -> int:
        return self._process.pid

    @property
    def pid(self) -> int:
        """The tenant process itself (the launcher's child)."""
        return int(wait_for(f"{self.name} to start", lambda: next(iter(self._children()), 0)))

    def _children(self) -> list[int]:
        pid = self._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> None:
        """The launcher ends its subtree, paused processes too."""
        if self._process.poll() is None:
            for child in self._children():
                os.kill(child, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ANSWER_S)
        super().end()


def valve_run(
    socket: Path, runtime: Path, workload: str, name: str, command: Sequence[str], options: Sequence[str] = ()
) -> list[str]:
    """The command line that runs `command` as a tenant; name "": as `valve run` names it."""
    return [
        sys.executable, "-m", "valve_cli.main", "run", "--workload", workload,
        *(["--name", name] if name else []), "--socket", str(socket), "--runtime", str(runtime), *options,
        "--", *command,
    ]  # fmt: skip
