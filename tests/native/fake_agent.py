# SPDX-License-Identifier: Apache-2.0
"""An agent that does exactly what a test tells it to, and nothing else.

Why it exists: libvalve must be tested against agents that are slow, gone, hung or wrong. Threading
model: the test's thread, plus one thread per link that writes heartbeats until told to stop. Every
wait has a deadline and fails the test when it passes.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from valve_agent import wire
from valve_agent.shared import Ledger, Page, ledger_bytes

WAIT_S = 20.0
SLAB_BYTES = 4 << 20
QUARANTINE_BYTES = 2 << 20
F = TypeVar("F", bound=wire.Frame)


class AgentArena:
    """The agent's side of one arena: it owns the memory, and can look into it."""

    def __init__(self, slabs: int) -> None:
        self.slabs = slabs
        self.memory_fd = os.memfd_create("arena", os.MFD_CLOEXEC)
        os.ftruncate(self.memory_fd, slabs * SLAB_BYTES)
        self.quarantine_fd = os.memfd_create("quarantine", os.MFD_CLOEXEC)
        os.ftruncate(self.quarantine_fd, SLAB_BYTES)
        self.ledger_fd, self.ledger = Ledger.create(slabs)

    @property
    def fds(self) -> list[int]:
        return [self.memory_fd, self.quarantine_fd, self.ledger_fd]

    def resident_bytes(self) -> int:
        return os.fstat(self.memory_fd).st_blocks * 512

    def byte(self, slab: int) -> int:
        return os.pread(self.memory_fd, 1, slab * SLAB_BYTES)[0]

    def punch(self, slab: int) -> None:
        """FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        args = (self.memory_fd, 3, ctypes.c_long(slab * SLAB_BYTES), ctypes.c_long(SLAB_BYTES))
        assert libc.fallocate(*args) == 0, os.strerror(ctypes.get_errno())

    def close(self) -> None:
        self.ledger.close()
        for fd in self.fds:
            os.close(fd)


class Link:
    """One accepted connection."""

    def __init__(self, sock: socket.socket, lease_ms: int) -> None:
        self.sock = sock
        self.sock.settimeout(WAIT_S)
        self.lease_ms = lease_ms
        credentials = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.peer_pid = int.from_bytes(credentials[:4], "little")
        self.fds: list[int] = []
        self.page_fd, self.page = Page.create()
        self._beating = threading.Event()
        self._beater: threading.Thread | None = None

    def expect(self, kind: type[F]) -> F:
        """The next frame, which must be of this kind; its descriptors are in `fds`."""
        frame, fds = wire.recv(self.sock)
        self.fds = fds
        assert isinstance(frame, kind), f"expected {kind.__name__}, got {frame!r}"
        return frame

    def expect_end(self) -> None:
        try:
            frame, _ = wire.recv(self.sock)
        except (wire.ConnectionClosed, ConnectionResetError):
            return
        raise AssertionError(f"expected the end of the connection, got {frame!r}")

    def send(self, frame: wire.Frame, fds: Iterable[int] = ()) -> None:
        wire.send(self.sock, frame, list(fds))

    def welcome(
        self,
        role: wire.Role,
        doorbell: int | None = None,
        slabs_limit: int = 64,
        device: wire.Device = wire.Device.CPU,
    ) -> wire.Hello:
        hello = self.expect(wire.Hello)
        self.page.heartbeat_ns = time.monotonic_ns()
        self.start_heart()
        frame = wire.Welcome(
            role=role, device=device, tenant=1, slab_bytes=SLAB_BYTES,
            slabs_limit=slabs_limit, lease_ms=self.lease_ms,
        )  # fmt: skip
        self.send(frame, [self.page_fd] if doorbell is None else [self.page_fd, doorbell])
        return hello

    def serve_arena(self, quarantine_bytes: int = QUARANTINE_BYTES) -> AgentArena:
        """Answer the ARENA_OPEN that must come next."""
        arena = AgentArena(self.expect(wire.ArenaOpen).slabs)
        frame = wire.Arena(
            slabs=arena.slabs, slab_bytes=SLAB_BYTES, quarantine_bytes=quarantine_bytes,
            ledger_bytes=ledger_bytes(arena.slabs),
        )  # fmt: skip
        self.send(frame, arena.fds)
        return arena

    def grant(self, slabs: Iterable[int]) -> None:
        self.send(wire.Grant(at_ns=time.monotonic_ns(), set=wire.Bitmap.of(slabs)))

    def reclaim(self, slabs: Iterable[int], operation: int = 7) -> None:
        """Returns when the slabs are remapped."""
        wanted = set(slabs)
        self.send(wire.Reclaim(id=operation, at_ns=time.monotonic_ns(), set=wire.Bitmap.of(wanted)))
        done = self.expect(wire.Reclaimed)
        assert done.id == operation
        assert set(done.set) == wanted

    def start_heart(self) -> None:
        self._beating.clear()
        self._beater = threading.Thread(target=self._beat, name="heart")
        self._beater.start()

    def stop_heart(self) -> None:
        self._beating.set()
        if self._beater is not None:
            self._beater.join()
            self._beater = None

    def _beat(self) -> None:
        while not self._beating.wait(self.lease_ms / 8000):
            self.page.heartbeat_ns = time.monotonic_ns()

    def close(self) -> None:
        self.stop_heart()
        self.sock.close()


class FakeAgent:
    """A listening socket. `close` is the agent's death; `listen` its return. The lease is long, so that a
    busy machine does not end it; tests of the lease shorten it."""

    def __init__(self, path: Path, lease_ms: int = 5000) -> None:
        self.path = path
        self.lease_ms = lease_ms
        self.links: list[Link] = []
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._listener: socket.socket | None = None
        self.listen()

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen(16)

    def accept(self, timeout_s: float = WAIT_S) -> Link:
        """The next connection. Raises TimeoutError."""
        assert self._listener is not None
        self._listener.settimeout(timeout_s)
        sock, _ = self._listener.accept()
        link = Link(sock, self.lease_ms)
        self.links.append(link)
        return link

    def fill_backlog(self) -> list[socket.socket]:
        """From now on whoever connects waits. Returns what holds the places."""
        assert self._listener is not None
        self._listener.listen(0)
        waiting: list[socket.socket] = []
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.setblocking(False)
            try:
                sock.connect(str(self.path))
            except BlockingIOError:
                sock.close()
                return waiting
            waiting.append(sock)

    def rings(self) -> int:
        """How often the doorbell rang since the last call."""
        try:
            return os.eventfd_read(self.doorbell)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for link in self.links:
            link.close()
        self.links.clear()
