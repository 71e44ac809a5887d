# SPDX-License-Identifier: Apache-2.0
"""The two sides that `valve bench preempt` compares, each a set of real processes.

Why it exists: `Ours` is the real path (libvalve in an online process, its page and doorbell, the real gate
process, a victim with libvalve's barrier registration); `Floor` is a small C program that does the least
possible. Victim, pauses between cycles and the look at the victim's counters are the same code in both.

Threading model: one thread. Every process started here is ended by `close`. Caller: preempt.py, and the
gate's tests, which use the victim.

    rig.RigError      something the bench needs is missing or broke; the message says what to do
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from valve_agent import wire
from valve_agent.gate_link import GateHandle, GateSettings
from valve_agent.shared import Page
from valve_cli.bench.rig import RigError

HERE = Path(__file__).resolve().parent
_CONNECT_TIMEOUT_S = 10.0
_HOLD_TIMEOUT_S = 10.0


def compile_c(name: str, folder: Path, include: Path | None = None) -> Path:
    """Compile HERE/name.c into `folder`. Raises RigError without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RigError("no C compiler: install one (Debian: apt-get install gcc libc6-dev)")
    binary = folder / name
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{HERE}"]
    flags += [f"-I{include}"] if include else []
    command = [compiler, *flags, "-o", str(binary), str(HERE / f"{name}.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RigError(f"{name}.c does not compile:\n{done.stderr}")
    return binary


class Counters:
    """The file in which a victim's spinning threads count, one cache line each."""

    def __init__(self, path: Path, spinners: int) -> None:
        path.write_bytes(bytes(4096))
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
        self._words = memoryview(self._map).cast("B").cast("Q")
        self.spinners = spinners

    def read(self) -> list[int]:
        return [self._words[8 * i] for i in range(self.spinners)]

    def close(self) -> None:
        self._words.release()
        self._map.close()


def victim_command(
    binary: Path, counters: Counters, sleepers: int, barrier: bool = True, leader: str = "wait"
) -> list[str]:
    return [
        str(binary), str(counters.path), str(counters.spinners), str(sleepers), str(int(barrier)), leader,
    ]  # fmt: skip


def start_victim(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Returns once all its threads are there; end it with kill and wait."""
    victim = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert victim.stdout is not None
    if victim.stdout.readline() != b"ready\n":
        victim.kill()
        victim.wait()
        raise RigError("the victim did not start; its standard error says why")
    return victim


class Pacing:
    """How a cycle is spaced, in microseconds: at least `hold` twice stopped, `gap` to 2 `gap` running."""

    def __init__(self, hold_us: int = 1000, gap_us: int = 1000) -> None:
        self.words = [str(hold_us), str(gap_us)]


class Floor:
    """floor.c and its victim; stopped between blocks."""

    def __init__(self, binary: Path, victim: Sequence[str], counters: Counters, pacing: Pacing) -> None:
        command = [str(binary), *pacing.words, str(counters.path), str(counters.spinners), *victim]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def block(self, cycles: int) -> tuple[list[int], int]:
        """(latencies in ns, cycles in which the victim moved while stopped)"""
        *latencies, moved = _ask(self._process, cycles, cycles + 1)
        return latencies, moved

    def close(self) -> None:
        _end(self._process)


class Ours:
    """An online process with libvalve, the gate, and a victim; paused between blocks."""

    def __init__(
        self,
        binary: Path,
        libvalve: Path,
        victim: Sequence[str],
        counters: Counters,
        pacing: Pacing,
        folder: Path,
    ) -> None:
        with contextlib.ExitStack() as undo:
            settings = GateSettings(cooldown_factor=0, cooldown_min_ns=0, recovery_grace_ns=0)
            self.gate = GateHandle.start("cpu", settings)
            undo.callback(self.gate.close)
            self._victim = start_victim(victim)
            undo.callback(_kill, self._victim)
            self._add_victim(undo)
            self.gate.hold(_HOLD_TIMEOUT_S)
            page_fd, self._page = Page.create()
            undo.callback(self._page.close)
            undo.callback(os.close, page_fd)
            os.set_inheritable(page_fd, True)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._listener.close)
            path = folder / "agent.sock"
            self._listener.bind(str(path))
            self._listener.listen(1)
            self._listener.settimeout(_CONNECT_TIMEOUT_S)
            command = [
                str(binary), *pacing.words, str(counters.path), str(counters.spinners), str(libvalve),
                str(page_fd),
            ]  # fmt: skip
            self._online = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[page_fd],
                env={**os.environ, "VALVE_SOCKET": str(path), "VALVE_WORKLOAD": "online"},
            )
            undo.callback(_end, self._online)
            self._connection = self._welcome(page_fd)
            undo.callback(self._connection.close)
            self.gate.add_engine(1, self._online.pid, page_fd)
            _read(self._online, 1)
            self._undo = undo.pop_all()

    def _add_victim(self, undo: contextlib.ExitStack) -> None:
        pidfd = os.pidfd_open(self._victim.pid)
        page_fd, page = Page.create()
        self.gate.add_target(2, self._victim.pid, pidfd, page_fd, barrier=True)
        os.close(pidfd)
        os.close(page_fd)
        undo.callback(page.close)

    def _welcome(self, page_fd: int) -> socket.socket:
        """Be the agent's server for one online process."""
        try:
            connection, _ = self._listener.accept()
            connection.settimeout(_CONNECT_TIMEOUT_S)
            wire.recv(connection)
        except TimeoutError as error:
            raise RigError("libvalve did not connect within 10 s; its standard error says why") from error
        answer = wire.Welcome(
            role=wire.Role.ONLINE, device=wire.Device.CPU, tenant=1, slab_bytes=1 << 21, lease_ms=1000
        )
        wire.send(connection, answer, [page_fd, self.gate.doorbell_fd])
        return connection

    def block(self, cycles: int) -> tuple[list[int], list[int], int]:
        """(latencies in ns from busy_since to evicted, their part after the gate woke, cycles in which the
        victim moved while the gate said paused)"""
        self.gate.release()
        (moved,) = _ask(self._online, cycles, 1)
        self.gate.hold(_HOLD_TIMEOUT_S)
        pauses = [
            event
            for event in self.gate.read_events()
            if event["event"] == "pause" and event["reason"] == "busy"
        ]
        if len(pauses) != cycles:
            raise RigError(f"{len(pauses)} preemptions in {cycles} cycles: the figures would mean nothing")
        latencies = [round(event["latency_us"] * 1000) for event in pauses]
        return latencies, [round(event["stop_us"] * 1000) for event in pauses], moved

    def close(self) -> None:
        self._undo.close()


def _ask(process: subprocess.Popen[bytes], cycles: int, words: int) -> tuple[int, ...]:
    assert process.stdin is not None
    process.stdin.write(b"%d\n" % cycles)
    process.stdin.flush()
    return _read(process, words)


def _read(process: subprocess.Popen[bytes], words: int) -> tuple[int, ...]:
    assert process.stdout is not None
    data = _exactly(process.stdout, 8 * words)
    if len(data) != 8 * words:
        raise RigError(f"a bench process ended early (exit status {process.poll()})")
    return struct.unpack(f"{words}Q", data)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            break
        data += more
    return data


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its stdin, which ends it; kill it if it does not."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
