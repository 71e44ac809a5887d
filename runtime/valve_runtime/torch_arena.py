# SPDX-License-Identifier: Apache-2.0
"""Slips the arena under the one big tensor that an engine allocates for its KV cache.

Engines make that tensor with ``torch.zeros`` of bytes. While ``on_arena`` is open, that one call is
answered with a tensor over the arena. It is not zeroed: a granted slab reads as zeros, and what is
not granted lies on the quarantine page, which nobody may rely on.

Threading: the thread that allocates the cache. torch is imported when needed, never before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from valve_runtime.elastic import EngineUnsupported

if TYPE_CHECKING:
    from valve_runtime._lib import Arena

SMALLEST_BYTES = 1 << 20
"""An engine's small tensors are not its KV cache."""


@contextmanager
def on_arena(arena: Arena, nbytes: int | None = None) -> Iterator[None]:
    """Answer one ``torch.zeros(n, dtype=int8 or uint8)`` with memory of the arena: the one of ``nbytes``
    bytes if given, else the first of at least ``SMALLEST_BYTES``.

    Raises EngineUnsupported if there was none or more than one, or if it does not fit.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    taken = 0

    class OnArena(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal taken
            kwargs = kwargs or {}
            if func is torch.zeros and kwargs.get("dtype") in (torch.int8, torch.uint8):
                size = args[0] if args and isinstance(args[0], int) else 0
                if size == nbytes or (nbytes is None and size >= SMALLEST_BYTES):
                    taken += 1
                    return tensor(size, kwargs["dtype"])
            return func(*args, **kwargs)

    def tensor(size: int, dtype: Any) -> Any:
        if size > arena.nbytes:
            raise EngineUnsupported(
                f"the KV cache of {size} bytes does not fit the arena of {arena.nbytes} bytes; "
                "give the tenant more device memory or lower the engine's maximal sequence length"
            )
        return torch.frombuffer((ctypes.c_char * size).from_address(arena.base), dtype=dtype)

    with OnArena():
        yield
    if taken != 1:
        raise EngineUnsupported(
            f"the engine made {taken} backing buffers for its KV cache where 1 was expected: this version "
            "lays it out in a way that Valve does not know; use a supported version"
        )
