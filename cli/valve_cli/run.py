# SPDX-License-Identifier: Apache-2.0
"""`valve run`: start a command as a tenant, on a machine without Kubernetes.

Why it exists: the agent must know whose a process is without believing the process. The launcher registers
itself, and every descendant of it is the tenant; as a child subreaper it keeps even orphaned descendants.

Online starts whether there is an agent or not (it must never wait for Valve); offline waits for one, for
what nobody can pause must not share the device. When the agent restarts, the launcher registers again.
When the command ends, what it left behind is ended too, as in a container.

Threading model: the main thread waits for signals and children; one daemon thread keeps the connection.
Called by valve_cli.main.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from valve_agent import sockets, wire
from valve_agent.identity import children_of

RETRY_S = 0.1
"""Between attempts to reach the agent."""
LINGER_S = 5.0
"""What the command left behind gets this long after SIGTERM."""
_FORWARDED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGWINCH,
)  # fmt: skip
_SI_KERNEL = 0x80
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


class RunError(Exception):
    """The command is not started; the message says what to do."""


class Registration:
    """This launcher's standing with the agent, renewed after every loss."""

    def __init__(self, path: Path, role: wire.Role, memory_bytes: int, name: str) -> None:
        self._path = path
        self._frame = wire.Tenant(
            version_min=wire.VERSION_MIN, version_max=wire.VERSION_MAX, role=role, memory_bytes=memory_bytes,
            name=name.encode()[: wire.NAME_BYTES - 1],
        )  # fmt: skip
        self._sock: socket.socket | None = None

    def attempt(self) -> str | None:
        """Register once. None if it worked, else why there is no agent to register with. Raises RunError if
        the agent refuses."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        sock.settimeout(5.0)
        try:
            sock.connect(str(self._path))
            wire.send(sock, self._frame)
            answer, _ = wire.recv(sock)
        except (OSError, wire.ConnectionClosed) as error:
            sock.close()
            return str(error)
        except wire.WireError as error:
            sock.close()
            raise RunError(f"{self._path} does not speak Valve's protocol: {error}") from error
        if isinstance(answer, wire.Reject):
            sock.close()
            raise RunError(f"the agent refuses: {answer.sentence}")
        sock.settimeout(None)
        self._sock = sock
        return None

    def keep(self) -> None:
        """Start the thread that registers again whenever the connection is lost."""
        threading.Thread(target=self._keep_loop, name="valve-registration", daemon=True).start()

    def _keep_loop(self) -> None:
        said = ""
        while True:
            if self._sock is not None:
                self._wait_for_end(self._sock)
                self._sock.close()
                self._sock = None
            try:
                self.attempt()
                said = "" if self._sock is not None else said
            except RunError as error:  # the command runs; all we can do is say it, once
                if str(error) != said:
                    said = str(error)
                    print(f"valve run: {error}", file=sys.stderr)
            if self._sock is None:
                time.sleep(RETRY_S)

    @staticmethod
    def _wait_for_end(sock: socket.socket) -> None:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.poll()


def child_environment(environ: Mapping[str, str], path: Path, workload: str, runtime: Path) -> dict[str, str]:
    """The command's environment: libvalve preloaded after what is there, the engine plugins importable."""
    library = find_library(runtime)
    preload = environ.get("LD_PRELOAD", "").split()
    python_path = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {
        **environ,
        "LD_PRELOAD": " ".join([*preload, str(library)]),
        "PYTHONPATH": os.pathsep.join([str(runtime / "python"), *python_path]),
        "VALVE_SOCKET": str(path),
        "VALVE_WORKLOAD": workload,
    }


def find_library(runtime: Path) -> Path:
    """libvalve of a runtime bundle (runtime/build.py). Raises RunError."""
    found = sorted((runtime / "lib").glob("libvalve-*.so"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RunError(
            f"no libvalve in {runtime / 'lib'}: build it with `make runtime`, or give --runtime DIR"
        )
    return found[-1]


def default_runtime() -> Path:
    """build/runtime of the checkout that this file lies in."""
    return Path(__file__).resolve().parents[2] / "build" / "runtime"


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    path = (arguments.socket or sockets.default_path(os.environ, os.getuid())).absolute()
    role = wire.Role.ONLINE if arguments.workload == "online" else wire.Role.OFFLINE
    try:
        memory_bytes = _memory_bytes(arguments.memory, role)
        environment = child_environment(os.environ, path, arguments.workload, arguments.runtime.absolute())
        registration = Registration(
            path, role, memory_bytes, arguments.name or Path(arguments.command[0]).name
        )
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _register_first(registration, role)
        return _run_command(arguments.command, environment, registration, role)
    except RunError as error:
        print(f"valve run: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="valve run",
        usage="valve run --workload online|offline [options] -- CMD [ARG ...]",
        description="Start a command as a tenant of the local agent. Its exit status is the command's.",
    )
    parser.add_argument("--workload", required=True, choices=["online", "offline"])
    parser.add_argument(
        "--memory", metavar="SIZE", help="offline: most device memory, such as 1Gi (default: the policy's)"
    )
    parser.add_argument("--name", help="the tenant's name in logs and metrics (default: the command's)")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the agent's socket")
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="DIR",
        default=default_runtime(),
        help="the runtime bundle (default: build/runtime)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    arguments = parser.parse_args(argv)
    if arguments.command[:1] == ["--"]:
        arguments.command = arguments.command[1:]
    if not arguments.command:
        parser.error("no command: valve run --workload offline -- python batch.py")
    return arguments


def _memory_bytes(text: str | None, role: wire.Role) -> int:
    if text is None:
        return 0
    if role == wire.Role.ONLINE:
        raise RunError(
            "--memory is a limit for offline tenants; online may use the whole device: leave it out"
        )
    from valve_api.errors import UnitError
    from valve_api.quantity import Quantity

    try:
        return int(Quantity(text))
    except UnitError as error:
        raise RunError(f"--memory {text}: {error}") from error


def _register_first(registration: Registration, role: wire.Role) -> None:
    """Before the command starts, so that its first process is known. Raises RunError."""
    why = registration.attempt()
    if why is None:
        return
    if role == wire.Role.ONLINE:
        print(
            f"valve run: no agent ({why}); starting all the same, and registering when there is one",
            file=sys.stderr,
        )
        return
    print(f"valve run: waiting for an agent ({why}); offline does not run without one", file=sys.stderr)
    while registration.attempt() is not None:
        time.sleep(RETRY_S)


def _run_command(
    command: list[str], environment: dict[str, str], registration: Registration, role: wire.Role
) -> int:
    signals = {*_FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        _exec(command, environment, before, role)
    registration.keep()
    while True:
        info = signal.sigwaitinfo(signals)
        if info.si_signo == signal.SIGCHLD:
            status = _reap(child)
            if status is not None:
                _end_rest()
                return (
                    os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
                )
        elif info.si_code != _SI_KERNEL:  # the terminal sends ^C to the child itself
            os.kill(child, info.si_signo)


def _exec(
    command: list[str], environment: dict[str, str], mask: set[int | signal.Signals], role: wire.Role
) -> NoReturn:
    """In the child: become the command. An offline one dies with its launcher, online never does."""
    if role == wire.Role.OFFLINE:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        print(f"valve run: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _reap(child: int) -> int | None:
    """Reap everything that ended; the wait status of `child` if it was among it."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


def _end_rest() -> None:
    """End what the command left behind: asked first, killed after LINGER_S (a paused process cannot hear)."""
    deadline = time.monotonic() + LINGER_S
    asked = False
    while rest := children_of(os.getpid()):
        late = time.monotonic() > deadline
        if late or not asked:
            for pid in rest:
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            asked = True
        signal.sigtimedwait({signal.SIGCHLD}, 0.05)
        _reap(-1)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise RunError(f"prctl({option}): {os.strerror(number)}")
