# SPDX-License-Identifier: Apache-2.0
"""The event loop of the agent's main process: sockets, process ends, timers, the gate's events.

Why it exists: everything that main does is short and happens in one thread, so nothing needs a lock; what
may take long (a hold) is done elsewhere and comes back as an event. A peer can only harm itself: packets
are read a few at a time, sends never wait, and a malformed frame closes its own connection.

Threading model: `run` owns the calling thread. Other threads may call `wake` and nothing else. Callers:
main.py; the decisions are in agent.py, behind `Handler`.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Protocol

from valve_agent import wire
from valve_agent.connection import Connection, Kind
from valve_agent.identity import IdentityError, peer_of

PACKETS_PER_TURN = 16
"""Packets read from one peer before the others get their turn."""
CONNECTIONS_MAX = 4096
UNIDENTIFIED_MAX = 256
"""Connections that have not said who they are: anybody may open those."""
FIRST_FRAME_NS = 5_000_000_000
"""A peer that says nothing for so long is dropped."""
_TURN_S_MAX = 1.0


class Handler(Protocol):
    """What agent.py does with what the server sees."""

    def on_frame(self, connection: Connection, frame: wire.Frame, fds: list[int]) -> None:
        """The handler owns the descriptors. May raise IdentityError or WireError: the peer is rejected."""
        ...

    def on_closed(self, connection: Connection, why: str) -> None: ...

    def on_turn(self) -> None:
        """Once after every round of events, for timers."""
        ...

    def deadline_ns(self) -> int | None:
        """When `on_turn` must run at the latest."""
        ...

    def on_protocol_error(self, connection: Connection, error: Exception) -> None:
        """For the log; the server rejects and closes."""
        ...


class Server:
    def __init__(self, listener: socket.socket, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """`listener`: a bound and listening SEQPACKET socket; owned by the server from here on."""
        self.connections: dict[int, Connection] = {}
        self._listener = listener
        self._listener.setblocking(False)
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._next = 1
        self._stopping = False
        self._handler: Handler | None = None
        self._accepting_again_ns = 0
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._woken)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever `fd` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def unwatch(self, fd: int) -> None:
        self._selector.unregister(fd)

    def wake(self) -> None:
        """Make the loop run a turn soon. Any thread, and signal handlers."""
        os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Leave `run` after this turn. Any thread, and signal handlers."""
        self._stopping = True
        self.wake()

    def run(self, handler: Handler) -> None:
        self._handler = handler
        while not self._stopping:
            for key, events in self._selector.select(self._timeout_s(handler)):
                if isinstance(key.data, Connection):
                    self._on_ready(key.data, events)
                else:
                    key.data()
            self._drop_hopeless()
            handler.on_turn()

    def close(self) -> None:
        """Close every socket. Runtimes notice, stop offline themselves and reconnect to a successor."""
        for connection in list(self.connections.values()):
            self.drop(connection, "the agent stops")
        self._listener.close()
        self._selector.close()
        os.close(self._wake_fd)

    def drop(self, connection: Connection, why: str) -> None:
        """Close a connection. Idempotent."""
        if connection.kind is Kind.CLOSED:
            return
        assert self._handler is not None
        self._handler.on_closed(connection, why)
        connection.kind = Kind.CLOSED
        connection.clear()
        del self.connections[connection.id]
        self._selector.unregister(connection.sock)
        connection.sock.close()
        os.close(connection.peer.pidfd)

    def reject(self, connection: Connection, code: wire.RejectCode, sentence: str) -> None:
        connection.reject(code, sentence)
        self.drop(connection, sentence)

    def _timeout_s(self, handler: Handler) -> float:
        deadline = handler.deadline_ns()
        if deadline is None:
            return _TURN_S_MAX
        return min(_TURN_S_MAX, max(0.0, (deadline - self._clock()) / 1e9))

    def _woken(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            return

    def _accept(self) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting()
                    return
                if error.errno in (errno.ECONNABORTED, errno.EINTR):
                    continue
                raise
            self._admit(sock)

    def _pause_accepting(self) -> None:
        """Out of descriptors: serve those who are here, look again in a second."""
        self._selector.unregister(self._listener)
        self._accepting_again_ns = self._clock() + 1_000_000_000

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            peer = peer_of(sock)
        except (IdentityError, OSError):
            sock.close()
            return

        def wants_write(wanted: bool) -> None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
            self._selector.modify(sock, events, connection)

        connection = Connection(self._next, sock, peer, self._clock(), wants_write)
        self._next += 1
        unidentified = sum(1 for other in self.connections.values() if other.kind is Kind.NEW)
        if len(self.connections) >= CONNECTIONS_MAX or unidentified >= UNIDENTIFIED_MAX:
            connection.reject(wire.RejectCode.EPERM, "the agent has too many connections; try again later")
            sock.close()
            os.close(peer.pidfd)
            return
        self.connections[connection.id] = connection
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _on_ready(self, connection: Connection, events: int) -> None:
        if connection.id not in self.connections:  # closed by an earlier event of this turn
            return
        if events & selectors.EVENT_WRITE:
            connection.flush()
        if not events & selectors.EVENT_READ:
            return
        assert self._handler is not None
        for _ in range(PACKETS_PER_TURN):
            try:
                frame, fds = wire.recv(connection.sock, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except wire.ConnectionClosed as error:
                self.drop(connection, str(error))
                return
            except wire.WireError as error:
                self._refuse(connection, error, error.code)
                return
            except OSError as error:
                self.drop(connection, f"the connection broke: {error}")
                return
            if isinstance(frame, (wire.Hello, wire.Tenant)):
                connection.version = min(wire.VERSION_MAX, frame.version_max)
            try:
                self._handler.on_frame(connection, frame, fds)
            except (wire.WireError, IdentityError) as error:
                self._refuse(connection, error, error.code)
            if connection.id not in self.connections:
                return

    def _refuse(self, connection: Connection, error: Exception, code: wire.RejectCode) -> None:
        assert self._handler is not None
        self._handler.on_protocol_error(connection, error)
        self.reject(connection, code, str(error))

    def _drop_hopeless(self) -> None:
        now = self._clock()
        for connection in list(self.connections.values()):
            if connection.overflowed:
                self.drop(connection, "it does not read what the agent sends")
            elif connection.kind is Kind.NEW and now - connection.opened_ns > FIRST_FRAME_NS:
                self.reject(connection, wire.RejectCode.EPROTO, "no first frame within 5 s")
        if self._accepting_again_ns and now >= self._accepting_again_ns:
            self._accepting_again_ns = 0
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
