# SPDX-License-Identifier: Apache-2.0
"""Whose process is at the other end of a socket.

Why it exists: a role decides who is stopped for whom, so it cannot come from what a process says. The
kernel says which process connected (SO_PEERCRED, and a pidfd so that the number cannot be reused under
us); which tenant it belongs to follows from its ancestors.

On a machine without Kubernetes (`LocalIdentity`) a tenant is the process subtree of a launcher that
registered itself. The address-space helper of a process connects in its name: it is accepted if its
parent is that process and both have one address space.

Threading model: stateless reads of /proc, each a few microseconds. Callers: agent.py, status.py.

    IdentityError   the peer is refused; `.code` is the REJECT's code, the text its sentence
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from valve_agent.wire import Hello, HelloFlag, RejectCode

_PEERCRED = struct.Struct("3i")
_SO_PEERPIDFD = 77
_SYS_KCMP = {"x86_64": 312, "aarch64": 272}.get(platform.machine())
_KCMP_VM = 1
_ANCESTORS_MAX = 256
_libc = ctypes.CDLL(None, use_errno=True)


class IdentityError(Exception):
    def __init__(self, code: RejectCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that called connect(), as the kernel says. Owns `pidfd`."""

    pid: int
    uid: int
    pidfd: int


def credentials_of(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of who connected, as the kernel says; pid 0: in a pid namespace that we do not see."""
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _gid = _PEERCRED.unpack(peer)
    return pid, uid


def peer_of(sock: socket.socket) -> Peer:
    """Raises IdentityError if the peer is already gone or hidden from us."""
    pid, uid = credentials_of(sock)
    if pid <= 0:
        raise IdentityError(
            RejectCode.EIDENTITY,
            "the agent cannot see your process: it runs outside the agent's pid namespace. Run the agent "
            "with the host's pid namespace (hostPID)",
        )
    try:
        pidfd = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
        os.set_inheritable(pidfd, False)
    except OSError:
        pidfd = _open_pidfd(pid)
    return Peer(pid, uid, pidfd)


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise IdentityError(RejectCode.EIDENTITY, f"process {pid} is gone: {error.strerror}") from error


T_co = TypeVar("T_co", covariant=True)


class Identity(Protocol[T_co]):
    """How peers become tenants here; Kubernetes has another one."""

    def may_register(self, peer: Peer) -> bool:
        """Whether this peer may announce a tenant."""
        ...

    def tenant_of(self, pid: int) -> T_co:
        """Raises IdentityError (EIDENTITY) for a process of no tenant."""
        ...

    def serves(self, pid: int) -> bool:
        """Whether `tenant_of` knows a tenant of this device for it."""
        ...

    def main_of(self, peer: Peer, hello: Hello) -> tuple[int, int]:
        """(pid, pidfd owned by the caller) of the engine process that this peer speaks for. Raises
        IdentityError if it may not speak for it."""
        ...


class LocalIdentity(Identity[T_co]):
    """Tenants are the process subtrees of launchers."""

    def __init__(self, launchers: Mapping[int, T_co], own_uid: int) -> None:
        """`launchers`: pid -> tenant; the registry's own mapping, read at every look-up."""
        self._launchers = launchers
        self._own_uid = own_uid

    def may_register(self, peer: Peer) -> bool:
        return peer.uid in (0, self._own_uid)

    def tenant_of(self, pid: int) -> T_co:
        for ancestor in ancestors(pid):
            tenant = self._launchers.get(ancestor)
            if tenant is not None:
                return tenant
        raise IdentityError(
            RejectCode.EIDENTITY,
            f"process {pid} belongs to no tenant: start it with `valve run --workload online|offline -- CMD`",
        )

    def serves(self, pid: int) -> bool:
        try:
            self.tenant_of(pid)
        except IdentityError:
            return False
        return True

    def main_of(self, peer: Peer, hello: Hello) -> tuple[int, int]:
        if not hello.flags & HelloFlag.HELPER:
            return peer.pid, os.dup(peer.pidfd)
        main = parent_of(peer.pid)
        if main is None or main <= 1:
            raise IdentityError(RejectCode.EIDENTITY, f"helper {peer.pid} has lost its process")
        pidfd = _open_pidfd(main)
        try:
            if parent_of(peer.pid) != main:  # the number was reused between the two looks
                raise IdentityError(RejectCode.EIDENTITY, f"helper {peer.pid} has lost its process")
            expected = own_pid_of(main)
            if expected != hello.main_pid:
                raise IdentityError(
                    RejectCode.EIDENTITY,
                    f"helper {peer.pid} speaks for process {hello.main_pid}, but its parent is {expected}",
                )
            if shares_memory(main, peer.pid) is False:
                raise IdentityError(
                    RejectCode.EIDENTITY, f"process {peer.pid} is no helper of {main}: their memory differs"
                )
        except BaseException:
            os.close(pidfd)
            raise
        return main, pidfd


def parent_of(pid: int) -> int | None:
    """The parent's pid; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def cpu_s(pid: int) -> float | None:
    """CPU time that all threads of a process have used, in seconds; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ancestors(pid: int) -> Iterator[int]:
    """The process, its parent, and so on, up to but without init."""
    current: int | None = pid
    for _ in range(_ANCESTORS_MAX):
        if current is None or current <= 1:
            return
        yield current
        current = parent_of(current)


def children_of(pid: int) -> list[int]:
    """Children of every thread of a process; [] if it is gone."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):
        return found
    return found


def own_pid_of(pid: int) -> int | None:
    """The process's pid in its own pid namespace; None if it is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"NSpid:"):
                    return int(line.split()[-1])
    except (FileNotFoundError, ProcessLookupError):
        return None
    return pid


def shares_memory(pid: int, other: int) -> bool | None:
    """Whether two processes have one address space; None where the kernel does not say."""
    if _SYS_KCMP is None:
        return None
    result = int(_libc.syscall(_SYS_KCMP, pid, other, _KCMP_VM, 0, 0))
    if result >= 0:
        return result == 0
    number = ctypes.get_errno()
    if number in (errno.EPERM, errno.ENOSYS):
        return None
    return False
