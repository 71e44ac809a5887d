# SPDX-License-Identifier: Apache-2.0
"""One peer's socket, as the server thread uses it: never waits, never trusts.

Why it exists: a peer may be stopped, hostile or just slow, and the same thread serves everybody. Frames that
do not fit into the socket wait in a bounded queue; a peer that lets it overflow is dropped.

Threading model: the server thread only. Callers: server.py (readiness), agent.py (send, reject).
"""

from __future__ import annotations

import enum
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from valve_agent import wire
from valve_agent.identity import Peer

QUEUE_FRAMES_MAX = 256
"""About 150 kB: more than any peer that reads will ever have waiting."""
_DRAIN_PACKETS_MAX = 1024


class Kind(enum.Enum):
    NEW = "new"
    LAUNCHER = "launcher"
    RUNTIME = "runtime"
    MEMORY = "memory connection"
    CLOSED = "closed"


class Connection:
    """`id` is never reused. Owns the socket and the peer's pidfd."""

    def __init__(
        self,
        number: int,
        sock: socket.socket,
        peer: Peer,
        opened_ns: int,
        wants_write: Callable[[bool], None],
    ) -> None:
        """`wants_write` is told whether the socket should be watched for writing."""
        self.id = number
        self.sock = sock
        self.peer = peer
        self.opened_ns = opened_ns
        self.kind = Kind.NEW
        self.version = wire.VERSION_MAX
        """the newest protocol that both sides speak, once the peer has said its own"""
        self.overflowed = False
        self._wants_write = wants_write
        self._queue: deque[tuple[wire.Frame, list[int]]] = deque()
        """With descriptors of its own: the sender closes its own when it likes, and numbers are reused."""

    def send(self, frame: wire.Frame, fds: Sequence[int] = ()) -> None:
        """Send now or queue; the descriptors stay the caller's and may be closed then. A peer that cannot be
        sent to is marked `overflowed`, and the server drops it after this round."""
        if self.kind is Kind.CLOSED or self.overflowed:
            return
        if self._queue:
            self._enqueue(frame, fds)
        elif not self._try(frame, fds):
            self._wants_write(True)
            self._enqueue(frame, fds)

    def flush(self) -> None:
        """The socket takes data again."""
        while self._queue and self._try(*self._queue[0]):
            _close(self._queue.popleft()[1])
        if not self._queue:
            self._wants_write(False)

    def reject(self, code: wire.RejectCode, sentence: str) -> None:
        """Say why, as the last frame. The caller closes the connection."""
        text = sentence.encode()[: wire.TEXT_BYTES - 1].decode(errors="ignore").encode()
        self.clear()
        self._try(wire.Reject(code=code, text=text), ())
        try:
            # Unread packets would make the peer's next recv fail before it sees the sentence.
            self.sock.shutdown(socket.SHUT_RD)
            for _ in range(_DRAIN_PACKETS_MAX):
                if not self.sock.recv(1):
                    break
        except OSError:
            return

    def clear(self) -> None:
        """Forget what waits to be sent."""
        while self._queue:
            _close(self._queue.popleft()[1])

    def _enqueue(self, frame: wire.Frame, fds: Sequence[int]) -> None:
        if len(self._queue) >= QUEUE_FRAMES_MAX:
            self.overflowed = True
            return
        own: list[int] = []
        try:
            for fd in fds:
                own.append(os.dup(fd))
        except OSError:  # the agent has no descriptors left
            _close(own)
            self.overflowed = True
        else:
            self._queue.append((frame, own))

    def _try(self, frame: wire.Frame, fds: Sequence[int]) -> bool:
        """False: the socket is full. A lost peer swallows frames: its close is seen by the reader."""
        try:
            frame.header.version = self.version
            wire.send(self.sock, frame, fds)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.ETOOMANYREFS):
                return False
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise
        return True


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
