# SPDX-License-Identifier: Apache-2.0
"""The system calls that Python's library lacks: membarrier, tgkill, prctl, scheduling slices.

Why it exists: ctypes prototypes made once, so that a call on the hot path allocates as little as it can.
Threading model: stateless. Callers: compute.py, gate.py. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

_NUMBERS = {
    "x86_64": {"membarrier": 324, "tgkill": 234, "sched_setattr": 314, "sched_getattr": 315},
    "aarch64": {"membarrier": 283, "tgkill": 131, "sched_setattr": 274, "sched_getattr": 275},
}
_CMD_GLOBAL_EXPEDITED = 1 << 1
_PR_SET_TIMERSLACK = 29
_MCL_CURRENT = 1

# PyDLL keeps the interpreter lock: in a process of one thread giving it up only costs time.
_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = (ctypes.c_long,) * 5
_syscall.restype = ctypes.c_long
_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_prctl.restype = ctypes.c_int
_mlockall = _libc.mlockall
_mlockall.argtypes = (ctypes.c_int,)
_mlockall.restype = ctypes.c_int

_numbers = _NUMBERS.get(platform.machine(), {})
_membarrier_number = _numbers.get("membarrier", -1)
_tgkill_number = _numbers.get("tgkill", -1)
_setattr_number = _numbers.get("sched_setattr", -1)
_getattr_number = _numbers.get("sched_getattr", -1)


class _SchedAttr(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


_attr = _SchedAttr()
_attr_size = ctypes.sizeof(_SchedAttr)
_attr_at = ctypes.addressof(_attr)
_SCHED_OTHER = 0


def membarrier_global_expedited() -> bool:
    """Interrupt every CPU that runs a thread of a registered process, and wait for them. Only the
    targets have to be registered, not the caller. False where the kernel refuses it."""
    return bool(_syscall(_membarrier_number, _CMD_GLOBAL_EXPEDITED, 0, 0, 0) == 0)


def tgkill(pid: int, tid: int, number: int) -> bool:
    """Send a signal to one thread. False if it is gone. Raises OSError otherwise."""
    if _syscall(_tgkill_number, pid, tid, number, 0) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.ESRCH:
        return False
    raise OSError(code, os.strerror(code))


def set_slice(tid: int, slice_ns: int) -> bool:
    """Ask the fair scheduler to give a thread turns of `slice_ns` (0: the kernel's own length, some
    milliseconds; 0.1 ms is the shortest). Its share of the CPU stays the same, but a thread of short turns
    gets its next one sooner: at once when it wakes while threads of longer turns run. False for a thread of
    another scheduling class or out of our reach; kernels before 6.12 accept it without effect."""
    if _syscall(_getattr_number, tid, _attr_at, _attr_size, 0) != 0 or _attr.policy != _SCHED_OTHER:
        return False
    _attr.size = _attr_size
    _attr.runtime_ns = slice_ns
    return bool(_syscall(_setattr_number, tid, _attr_at, 0, 0) == 0)


def run_first() -> bool:
    """Give this thread, and none of its children, a CPU before every thread of the fair scheduler: real
    time, lowest priority. False where that is not permitted; then nothing has changed."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        return False
    return True


def set_timer_slack(slack_ns: int) -> None:
    """How late the kernel may wake this thread from a sleep (default 50 us). Raises OSError."""
    if _prctl(_PR_SET_TIMERSLACK, slack_ns, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def lock_memory() -> bool:
    """Keep what this process has in memory now there. False where it is not permitted."""
    return bool(_mlockall(_MCL_CURRENT) == 0)
