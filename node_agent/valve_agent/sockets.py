# SPDX-License-Identifier: Apache-2.0
"""Where the agent listens: the default places, and taking one over from a dead predecessor.

Why it exists: a stale socket file must not stop a restarted agent, and a second agent must not steal the
socket of a living one.

Threading model: functions without state. Callers: main.py, `valve run`, `valve status`.

    SocketTaken    somebody answers there
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

BACKLOG = 512
STATUS_KIND = socket.SOCK_STREAM
STATUS_SUFFIX = ".status"
"""The status socket stands beside the agent's, with this suffix."""


class SocketTaken(Exception):
    pass


def default_path(environ: Mapping[str, str], uid: int) -> Path:
    """/run/valve for root, else the user's runtime directory. `environ`: of the caller's main."""
    if uid == 0:
        return Path("/run/valve/agent.sock")
    return Path(environ.get("XDG_RUNTIME_DIR", f"/run/user/{uid}")) / "valve" / "agent.sock"


def listen(path: Path, mode: int, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> socket.socket:
    """A listening socket at `path`, its directory made (0755) if missing. Raises SocketTaken, OSError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _remove_stale(path, kind)
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        mask = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path, kind: socket.SocketKind) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise SocketTaken(f"{path} exists and is no socket: remove it, or give --socket another path")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                path.unlink(missing_ok=True)
                return
            raise SocketTaken(f"{path} is in use ({error.strerror}): give --socket another path") from error
    raise SocketTaken(f"another agent listens at {path}: stop it, or give --socket another path")
