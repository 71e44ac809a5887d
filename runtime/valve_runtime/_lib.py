# SPDX-License-Identifier: Apache-2.0
"""libvalve for Python: a thin binding of `runtime/native/include/valve.h`.

The library is preloaded by whoever starts the process (`valve run`, or /etc/ld.so.preload in a pod);
nothing is searched or loaded here. In a process without it `load()` returns a Valve whose role is
ROLE_NONE and whose calls do nothing, so that engine plugins need no second code path.

Threading model: every method may be called from any thread; the ledger's methods belong to one thread.
Calls are short and keep the interpreter lock, except `attach`, `arena_open` and `place`, which may wait
and release it. Callers: the engine plugins beside this file, tests.

    ValveError
    └── ArenaDenied        no arena: the message is the agent's sentence, or says that it did not answer
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

ROLE_NONE, ROLE_ONLINE, ROLE_OFFLINE = 0, 1, 2
DEVICES = {1: "cpu", 2: "nvidia"}
GRANTED, LOST = 1, 2
COUNT_REQUESTS, COUNT_TOKENS, COUNT_RECOMPUTED, COUNT_LOST_BLOCKS, COUNT_RECOMPUTED_TOKENS = range(5)


class ValveError(Exception):
    """Root of this module's errors."""


class ArenaDenied(ValveError):
    """This process has no arena."""


@dataclass(frozen=True, slots=True)
class Arena:
    """Reserved address space; a slab that is not granted reads and writes, but keeps nothing."""

    base: int
    slab_bytes: int
    slabs: int

    @property
    def nbytes(self) -> int:
        return self.slab_bytes * self.slabs


class _Event(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_uint32), ("slab", ctypes.c_uint32))


_U32, _U64, _INT = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
_QUICK: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "valve_version": (ctypes.c_char_p, ()),
    "valve_role": (_INT, ()),
    "valve_device": (_INT, ()),
    "valve_connected": (_INT, ()),
    "valve_last_error": (ctypes.c_char_p, ()),
    "valve_busy": (None, ()),
    "valve_idle": (None, (_U64,)),
    "valve_count": (None, (_INT, _U64)),
    "valve_want": (_INT, (_U32, _INT)),
    "valve_return": (_INT, (_U32,)),
    "valve_poll": (_INT, (ctypes.POINTER(_Event),)),
    "valve_ledger_begin": (_INT, ()),
    "valve_ledger_request": (None, (_U32, _U32)),
    "valve_ledger_own": (None, (_U32, _U32)),
    "valve_ledger_pin": (None, (_U32,)),
    "valve_ledger_commit": (None, ()),
}
_WAITING: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "valve_attach": (_INT, (_INT,)),
    "valve_arena_open": (
        ctypes.c_void_p,
        (_U64, _INT, ctypes.POINTER(_U64), ctypes.POINTER(_U32)),
    ),
    "valve_torch_alloc": (ctypes.c_void_p, (ctypes.c_ssize_t, _INT, ctypes.c_void_p)),
    "valve_torch_free": (None, (ctypes.c_void_p, ctypes.c_ssize_t, _INT, ctypes.c_void_p)),
}


class Valve:
    """libvalve in this process; use `load()`."""

    def __init__(self, quick: Any, waiting: Any) -> None:
        """`quick`, `waiting`: the library bound with and without the interpreter lock; None: absent."""
        self._present = quick is not None
        for library, functions in ((quick, _QUICK), (waiting, _WAITING)):
            for name, (result, arguments) in functions.items():
                function: Any = getattr(library, name) if self._present else _absent
                if self._present:
                    function.restype, function.argtypes = result, arguments
                setattr(self, "_" + name.removeprefix("valve_"), function)

    _version: Any
    _role: Any
    _device: Any
    _connected: Any
    _last_error: Any
    _attach: Any
    _busy: Any
    _idle: Any
    _count: Any
    _want: Any
    _return: Any
    _poll: Any
    _arena_open: Any
    _torch_alloc: Any
    _torch_free: Any
    _ledger_begin: Any
    _ledger_request: Any
    _ledger_own: Any
    _ledger_pin: Any
    _ledger_commit: Any

    @property
    def present(self) -> bool:
        """Whether libvalve is in this process at all."""
        return self._present

    def version(self) -> str:
        """The library's version; "" without it."""
        return bytes(self._version() or b"").decode()

    def role(self) -> int:
        """ROLE_NONE in a process that is no tenant."""
        return int(self._role())

    def device(self) -> str:
        """The device that this process's agent serves, "cpu" or "nvidia"; "" before an agent answered."""
        return DEVICES.get(int(self._device()), "")

    def connected(self) -> bool:
        return bool(self._connected())

    def last_error(self) -> str:
        return bytes(self._last_error() or b"").decode("utf-8", "replace")

    def attach(self, timeout_ms: int) -> bool:
        """Connect now rather than at the first call that matters; whether an agent answered in time."""
        return bool(self._attach(timeout_ms))

    def busy(self) -> None:
        self._busy()

    def idle(self, decode_gap_ns: int) -> None:
        """`decode_gap_ns`: longest recent gap between two decode iterations; 0 if unknown."""
        self._idle(decode_gap_ns)

    def count(self, counter: int, n: int) -> None:
        """Add `n` to one of the COUNT_* counters."""
        self._count(counter, n)

    def arena_open(self, nbytes: int, timeout_ms: int) -> Arena:
        """This process's arena of at least `nbytes` (0: as much as the tenant may ever hold). A second
        call returns the same arena. Raises ArenaDenied."""
        slab_bytes, slabs = _U64(0), _U32(0)
        base = self._arena_open(nbytes, timeout_ms, ctypes.byref(slab_bytes), ctypes.byref(slabs))
        if not base:
            raise ArenaDenied(
                self.last_error() or "this process is no Valve tenant: start it with `valve run`"
            )
        return Arena(int(base), slab_bytes.value, slabs.value)

    def place(self, nbytes: int) -> int:
        """The address of `nbytes` of the arena, from a slab's start on, that nobody else in this process
        will be given; the first ones lie at the arena's base. Nothing is written there and nothing
        granted. Raises ArenaDenied."""
        at = self._torch_alloc(nbytes, 0, None)
        if not at:
            raise ArenaDenied(self.last_error() or f"the arena has no room for {nbytes} bytes in one piece")
        return int(at)

    def unplace(self, address: int, nbytes: int) -> None:
        """Let others have what `place` gave."""
        self._torch_free(address, nbytes, 0, None)

    def want(self, total_slabs: int, urgent: bool) -> None:
        """Say how many slabs this process would use in all. Grants come as events."""
        self._want(total_slabs, int(urgent))

    def give_back(self, slab: int) -> bool:
        """Return one slab; it must not be touched afterwards. False if it was not held (a loss that
        has not been polled yet is still to come as an event)."""
        return bool(self._return(slab) == 0)

    def poll(self) -> tuple[int, int] | None:
        """The next event as (GRANTED or LOST, slab), losses first; None if there is none."""
        event = _Event()
        if self._poll(ctypes.byref(event)) != 1:
            return None
        return event.kind, event.slab

    def ledger_begin(self) -> bool:
        """Start an update of the ownership ledger; False if there is no arena."""
        return bool(self._ledger_begin() == 0) and self._present

    def ledger_request(self, slot: int, tokens: int) -> None:
        """Losing the request in `slot` would mean computing `tokens` tokens again."""
        self._ledger_request(slot, tokens)

    def ledger_own(self, slab: int, slot: int) -> None:
        """The request in `slot` owns part of `slab`."""
        self._ledger_own(slab, slot)

    def ledger_pin(self, slab: int) -> None:
        """`slab` must never be reclaimed."""
        self._ledger_pin(slab)

    def ledger_commit(self) -> None:
        self._ledger_commit()


def _absent(*_: object) -> int:
    return 0


@cache
def load() -> Valve:
    """The preloaded libvalve, or a Valve that does nothing."""
    try:
        ctypes.CDLL(None).valve_version  # noqa: B018  (the look-up is the test)
    except AttributeError:
        return Valve(None, None)
    valve = Valve(ctypes.PyDLL(None), ctypes.CDLL(None))
    valve.attach(timeout_ms=0)  # an online process connects when it first uses the library: now
    return valve
