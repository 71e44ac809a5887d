# SPDX-License-Identifier: Apache-2.0
"""What waits in a connection's queue: descriptors that nobody else can close or reuse."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from valve_agent import wire
from valve_agent.connection import Connection, Kind
from valve_agent.server import Server

UNUSED: Any = None


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection whose socket is full, and its peer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    connection = Connection(1, ours, UNUSED, 0, lambda wanted: None)
    while not connection._queue:
        connection.send(wire.MemoryReady(route=1))
    yield connection, theirs
    connection.clear()
    ours.close()
    theirs.close()


def queue_a_pipe(connection: Connection) -> tuple[int, int]:
    """MEMORY_MAP with the writing end of a pipe waits to be sent: (its end that reads, the one that was
    sent and that the sender has closed)."""
    reads, writes = os.pipe()
    connection.send(wire.MemoryMap(id=7, count=1), [writes])
    os.close(writes)
    return reads, writes


def is_open_elsewhere(reads: int) -> bool:
    """Somebody has the other end."""
    os.set_blocking(reads, False)
    try:
        return os.read(reads, 1) != b""
    except BlockingIOError:
        return True


def test_a_queued_frame_brings_what_it_was_given(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    reads, number = queue_a_pipe(connection)
    other = os.open("/dev/null", os.O_RDONLY)
    assert other == number, "the number is somebody else's now"
    frames = []
    while connection._queue or not frames or not isinstance(frames[-1][0], wire.MemoryMap):
        frames.append(wire.recv(theirs))
        connection.flush()
    (got,) = frames[-1][1]
    os.write(got, b"it")
    assert os.read(reads, 2) == b"it"
    os.close(got)
    assert not is_open_elsewhere(reads), "the connection has closed its own"
    os.close(reads)
    os.close(other)


def test_a_rejected_peer_is_sent_nothing_more(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    reads, _ = queue_a_pipe(connection)
    assert is_open_elsewhere(reads)
    connection.reject(wire.RejectCode.EPROTO, "no")
    assert not is_open_elsewhere(reads)
    os.close(reads)


def test_a_dropped_peer_is_sent_nothing_more(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = Server(listener)
    server._handler = SimpleNamespace(on_closed=lambda connection, why: None)  # type: ignore[assignment]
    server.connections[connection.id] = connection
    server._selector.register(connection.sock, 1, connection)
    connection.peer = SimpleNamespace(pidfd=os.open("/dev/null", os.O_RDONLY))  # type: ignore[assignment]
    reads, _ = queue_a_pipe(connection)
    server.drop(connection, "it is gone")
    assert not is_open_elsewhere(reads)
    assert connection.kind is Kind.CLOSED
    server.close()
    os.close(reads)


def test_without_descriptors_the_peer_is_dropped_and_nobody_else(
    pair: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, _ = pair
    reads, writes = os.pipe()
    made: list[int] = []

    def dup(fd: int, real: Any = os.dup) -> int:
        if made:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(real(fd))
        return made[0]

    monkeypatch.setattr(os, "dup", dup)
    waiting = len(connection._queue)
    connection.send(wire.MemoryMap(id=7, count=2), [writes, writes])
    os.close(writes)
    assert (connection.overflowed, len(connection._queue)) == (True, waiting)
    assert not is_open_elsewhere(reads), "the first copy is closed"
    os.close(reads)
