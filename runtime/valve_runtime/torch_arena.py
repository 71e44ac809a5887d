# SPDX-License-Identifier: Apache-2.0
"""Slips the arena under the one big tensor that an engine allocates for its KV cache.

Engines make that tensor with ``torch.zeros`` of bytes. While ``on_arena`` is open, that one call is
answered with a tensor over the arena: on the cpu device over its host address, on a GPU over its
device address.

Why a tensor over an address (DLPack), and not an allocation in a ``torch.cuda.MemPool`` over libvalve's
allocator (``torch_pool``):

* size and place: the tensor has the bytes that were asked for and starts at the arena's first byte, so that
  the geometry of blocks and slabs holds by construction. torch's caching allocator rounds large pieces up
  (2 MiB and more) and may place a smaller one in what is left of a segment.
* nothing is launched: ``torch.zeros`` would fill all of it, gigabytes that are not granted and lie on the
  quarantine. A granted slab is zeroed by the agent; what is not granted nobody may rely on.
* what it does not touch: pools of graph captures, ``empty_cache``, the engine's memory statistics (cache
  that may be away is not memory that the process uses), ``expandable_segments``. The address stays valid as
  long as the process lives, so captured graphs may keep it.
* on both devices it is the same code, and the cpu device is where it can be tested with a real torch.

What such a tensor cannot do: be resized, or be shared with other processes by torch's CUDA IPC.

Threading: the thread that allocates the cache. torch is imported when needed, never before. On a GPU this
has not been run yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from valve_runtime.elastic import EngineUnsupported
from valve_runtime.torch_device import mismatch

if TYPE_CHECKING:
    from valve_runtime._lib import Arena

SMALLEST_BYTES = 1 << 20
"""An engine's small tensors are not its KV cache."""


class Places(Protocol):
    """Who decides which part of the arena is whose: libvalve (``_lib.Valve``)."""

    def device(self) -> str: ...
    def place(self, nbytes: int) -> int: ...
    def unplace(self, address: int, nbytes: int) -> None: ...


# DLPack's DLManagedTensor (dlpack.h, the layout before version 1.0, which every torch takes).


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_INT, _UINT = 0, 1
_CAPSULE = b"dltensor"
_kept: list[Any] = []  # torch reads these until the tensor goes; arenas live as long as the process


def tensor_at(address: int, nbytes: int, dtype: Any, device: Any) -> Any:
    """A tensor of ``nbytes`` elements of ``dtype`` (torch.int8 or torch.uint8) over memory at ``address`` of
    ``device`` (a torch.device). Nothing is copied, written or, when the tensor goes, freed."""
    import torch

    index = device.index or 0
    if device.type == "cuda" and device.index is None:
        index = torch.cuda.current_device()
    shape = (ctypes.c_int64 * 1)(nbytes)
    kind = _DataType(_INT if dtype is torch.int8 else _UINT, 8, 1)
    where = _Device(_DEVICE_TYPES[device.type], index)
    managed = _Managed(_Tensor(address, where, 1, kind, shape, None, 0), None, None)
    _kept.append((managed, shape))
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return torch.from_dlpack(capsule(ctypes.addressof(managed), _CAPSULE, None))


@contextmanager
def on_arena(places: Places, arena: Arena, nbytes: int | None = None) -> Iterator[list[tuple[int, int]]]:
    """Answer one ``torch.zeros(n, dtype=int8 or uint8)`` with memory of the arena: the one of ``nbytes``
    bytes if given, else the first of at least ``SMALLEST_BYTES``. Yields what will be (address, bytes) of it.

    Raises EngineUnsupported if there was none or more than one, if it does not fit, if part of the arena
    is somebody else's, or if the engine's device is not the agent's.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    taken = 0
    placed: list[tuple[int, int]] = []

    class OnArena(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal taken
            kwargs = kwargs or {}
            if func is torch.zeros and kwargs.get("dtype") in (torch.int8, torch.uint8):
                size = args[0] if args and isinstance(args[0], int) else 0
                if size == nbytes or (nbytes is None and size >= SMALLEST_BYTES):
                    taken += 1
                    if taken == 1:
                        device = kwargs.get("device")
                        device = torch.get_default_device() if device is None else torch.device(device)
                        return take(size, kwargs["dtype"], device)
            return func(*args, **kwargs)

    def take(size: int, dtype: Any, device: Any) -> Any:
        at = _place(places, arena, size, device)
        placed.append((at, size))
        tensor = tensor_at(at, size, dtype, device)
        if tensor.data_ptr() != at or tensor.numel() != size or tensor.device.type != device.type:
            raise EngineUnsupported(
                f"this torch ({torch.__version__}) does not make tensors over given memory as others do: "
                "use a supported version"
            )
        return tensor

    try:
        with OnArena():
            yield placed
        _check_one(taken)
    except BaseException:
        for at, size in placed:
            places.unplace(at, size)
        raise


def _check_one(taken: int) -> None:
    if taken != 1:
        raise EngineUnsupported(
            f"the engine made {taken} backing buffers for its KV cache where 1 was expected: this version "
            "lays it out in a way that Valve does not know; use a supported version"
        )


def _place(places: Places, arena: Arena, size: int, device: Any) -> int:
    why_not = mismatch(places.device(), device.type)
    if why_not:
        raise EngineUnsupported(why_not)
    if size > arena.nbytes:
        raise EngineUnsupported(
            f"the KV cache of {size} bytes does not fit the arena of {arena.nbytes} bytes; "
            "give the tenant more device memory or lower the engine's maximal sequence length"
        )
    at = places.place(size)
    if at != arena.base:
        places.unplace(at, size)
        raise EngineUnsupported(
            "another part of this process has memory of the arena already: an engine's KV cache has the "
            "arena for itself; use valve_runtime.torch_pool in processes without such an engine only"
        )
    return at
