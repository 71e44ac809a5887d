# SPDX-License-Identifier: Apache-2.0
"""Xids (the driver's reports of GPU errors) that come while a part runs, through NVML's events.

Threading model: one thread uses it. Caller: parts.py. Where NVML cannot watch, `problem` says why, and the
part's result carries it: no Xid seen is then no statement.
"""

from __future__ import annotations

import ctypes
import time
from types import TracebackType

_XID = 0x8
_TIMEOUT = 10
KILLED = 45
"""Preemptive channel removal: what the driver says when a process is killed while its kernels run, as every
victim here is. Reported, and no failure; what harms a channel has another number."""
SETTLE_MS = 200
MOST_S = 2.0


class _Event(ctypes.Structure):
    """nvmlEventData_t"""

    _fields_ = (
        ("device", ctypes.c_void_p),
        ("type", ctypes.c_ulonglong),
        ("data", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class XidWatch:
    """From `__enter__` on; `seen` collects."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self._set = ctypes.c_void_p()
        self._seen: list[int] = []

    def __enter__(self) -> XidWatch:
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            self.problem = str(error)
            return self
        device = ctypes.c_void_p()
        for name, arguments in (
            ("nvmlInit_v2", ()),
            ("nvmlDeviceGetHandleByIndex_v2", (0, ctypes.byref(device))),
            ("nvmlEventSetCreate", (ctypes.byref(self._set),)),
            ("nvmlDeviceRegisterEvents", (device, ctypes.c_ulonglong(_XID), self._set)),
        ):
            code = getattr(self._nvml, name)(*arguments)
            if code:
                self.problem = f"{name} answers {code}"
                break
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._set:
            self._nvml.nvmlEventSetFree(self._set)

    def seen(self) -> list[int]:
        """All Xids so far, in order. Ends though they keep coming."""
        event = _Event()
        until = time.monotonic() + MOST_S
        while self.problem is None and time.monotonic() < until:
            code = self._nvml.nvmlEventSetWait_v2(self._set, ctypes.byref(event), SETTLE_MS)
            if code == _TIMEOUT:
                break
            if code:
                self.problem = f"nvmlEventSetWait_v2 answers {code}"
            else:
                self._seen.append(int(event.data))
        return list(self._seen)
