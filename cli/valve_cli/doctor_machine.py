# SPDX-License-Identifier: Apache-2.0
"""What the kernel must give to any device, and what the `cpu` device needs beside it.

Why it exists: each of these fails late and far from its cause otherwise. Every check does the thing itself
(on a child of its own, for a microsecond) where that is harmless, and only else reads what the kernel says
of itself.

Threading model: none; forks one child that sleeps, and reaps it. Caller: doctor.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from valve_agent.devices.base import DeviceError
from valve_agent.devices.cpu.inventory import CpuInventory
from valve_agent.devices.cpu.memory import CpuMemoryPool
from valve_cli.doctor_report import Check, Level
from valve_cli.run import RunError, default_runtime, find_library

_PIDFD_GETFD = 438  # the same number on every architecture
_NUMBERS = {"x86_64": {"membarrier": 324, "kcmp": 312}, "aarch64": {"membarrier": 283, "kcmp": 272}}
_GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 1 << 1, 1 << 2
_KCMP_VM = 1
DESCRIPTORS = 65_536
LOCKED_BYTES = 64 << 20
SLAB_BYTES = 32 << 20

CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_NICE": 23}

_libc = ctypes.CDLL(None, use_errno=True)


def capabilities(status: str) -> frozenset[str]:
    """Those of CAPABILITIES that are in effect, from the text of /proc/self/status."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            mask = int(line.split()[1], 16)
            return frozenset(name for name, bit in CAPABILITIES.items() if mask >> bit & 1)
    return frozenset()


def machine_checks(root: Path = Path("/")) -> list[Check]:
    """`root`: where /proc is looked for, for tests."""
    have = capabilities(_text(root / "proc/self/status"))
    return [
        _architecture(platform.machine(), platform.release()),
        *_with_child(have, _text(root / "proc/sys/kernel/yama/ptrace_scope").strip()),
        _descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        _locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], "CAP_IPC_LOCK" in have),
        _privileges(have),
        _runtime(),
    ]


def cpu_checks() -> list[Check]:
    return [_memory(), _barrier(), _huge_pages()]


def _check(section: str) -> Callable[..., Check]:
    def make(name: str, level: Level, found: str, todo: str = "") -> Check:
        return Check(section, name, level, found, todo)

    return make


_machine, _cpu = _check("machine"), _check("cpu")


def _architecture(name: str, release: str) -> Check:
    if name in _NUMBERS:
        return _machine("kernel", "ok", f"Linux {release}, {name}")
    return _machine("kernel", "missing", f"Linux {release}, {name}", "use an x86_64 or aarch64 machine")


def _with_child(have: frozenset[str], yama: str) -> list[Check]:
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    try:
        return [_pidfd(child), _pidfd_getfd(child, have, yama), _kcmp(child)]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _pidfd(child: int) -> Check:
    try:
        os.close(os.pidfd_open(child))
    except OSError as error:
        return _machine(
            "pidfd_open", "missing", error.strerror or str(error),
            "use Linux 5.3 or newer and let no seccomp profile forbid it: the agent knows processes by it",
        )  # fmt: skip
    return _machine("pidfd_open", "ok", "works")


def _pidfd_getfd(child: int, have: frozenset[str], yama: str) -> Check:
    """Only a fallback: the runtime hands its file over by itself."""
    pidfd = -1
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(child)
    taken = _libc.syscall(_PIDFD_GETFD, pidfd, 0, 0)
    code = ctypes.get_errno()
    if pidfd >= 0:
        os.close(pidfd)
    if taken < 0:
        return _machine(
            "pidfd_getfd", "warning", os.strerror(code),
            "nothing, if every offline pod has the runtime, which hands its control file over by itself; "
            "for the fallback allow pidfd_getfd (Linux 5.6, seccomp profile)",
        )  # fmt: skip
    os.close(taken)
    if "CAP_SYS_PTRACE" not in have:
        return _machine(
            "pidfd_getfd", "warning", "works on processes of this user only",
            "run the agent as root, or with CAP_SYS_PTRACE, to reach tenants of other users",
        )  # fmt: skip
    if yama == "3":
        return _machine(
            "pidfd_getfd", "warning", "kernel.yama.ptrace_scope is 3: no process may be traced",
            "nothing, if every offline pod has the runtime; else set ptrace_scope below 3 (needs a reboot)",
        )  # fmt: skip
    return _machine("pidfd_getfd", "ok", "works")


def _kcmp(child: int) -> Check:
    numbers = _NUMBERS.get(platform.machine(), {})
    if _libc.syscall(numbers.get("kcmp", -1), os.getpid(), child, _KCMP_VM, 0, 0) >= 0:
        return _machine("kcmp", "ok", "works")
    return _machine(
        "kcmp", "warning", os.strerror(ctypes.get_errno()),
        "a helper is known by its parent alone; allow kcmp (CAP_SYS_PTRACE, CONFIG_KCMP) for the full check",
    )  # fmt: skip


def _descriptors(hard: int) -> Check:
    if hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS:
        return _machine("descriptors", "ok", "as many as wanted" if hard < 0 else f"up to {hard}")
    return _machine(
        "descriptors", "warning", f"at most {hard}",
        f"raise the hard limit (ulimit -Hn) to {DESCRIPTORS}: a tenant process costs ten, a slab one",
    )  # fmt: skip


def _locked(soft_bytes: int, capable: bool) -> Check:
    if capable or soft_bytes == resource.RLIM_INFINITY or soft_bytes >= LOCKED_BYTES:
        return _machine("memlock", "ok", "the agent can lock its memory")
    return _machine(
        "memlock", "warning", f"{soft_bytes >> 10} KiB may be locked",
        f"raise it (ulimit -l) to {LOCKED_BYTES >> 10} KiB or give CAP_IPC_LOCK: a swapped gate is late",
    )  # fmt: skip


def _privileges(have: frozenset[str]) -> Check:
    lacking = [name for name in ("CAP_SYS_ADMIN", "CAP_SYS_NICE", "CAP_SYS_PTRACE") if name not in have]
    if not lacking:
        return _machine("privileges", "ok", "CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_PTRACE")
    return _machine(
        "privileges", "warning", f"without {', '.join(lacking)}",
        "run the agent as root: else it reaches only processes of its own user, and no RESTART_RUNLIST",
    )  # fmt: skip


def _runtime() -> Check:
    try:
        return _machine("libvalve", "ok", str(find_library(default_runtime())))
    except RunError as error:
        advice = "the device plugin brings it into pods; for `valve run` build it with `make runtime`"
        return _machine("libvalve", "warning", str(error), advice)


def _memory() -> Check:
    try:
        (device,) = CpuInventory().devices()
    except DeviceError as error:
        return _cpu("memory", "missing", str(error), "mount /proc")
    return _cpu("memory", "ok", f"{device.memory_bytes / 2**30:.1f} GiB in the machine; {device.name}")


def _barrier() -> Check:
    number = _NUMBERS.get(platform.machine(), {}).get("membarrier", -1)
    commands = _libc.syscall(number, 0, 0, 0)
    wanted = _GLOBAL_EXPEDITED | _REGISTER_GLOBAL_EXPEDITED
    if commands >= 0 and commands & wanted == wanted:
        return _cpu("membarrier", "ok", "global expedited")
    return _cpu(
        "membarrier", "warning", "no global expedited membarrier",
        "use Linux 4.16 or newer and let no seccomp profile forbid it: else each thread is looked at, "
        "and a pause takes longer",
    )  # fmt: skip


def _huge_pages() -> Check:
    pool = CpuMemoryPool(SLAB_BYTES)
    try:
        if pool.why_small_pages is None:
            return _cpu("huge pages", "ok", "a private tmpfs with 2 MiB pages")
        found, _, todo = pool.why_small_pages.partition("; ")
        return _cpu("huge pages", "warning", found, todo or "run the agent with CAP_SYS_ADMIN")
    finally:
        pool.shut_down()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # kernels without it: the caller asks for a word and does not find it
