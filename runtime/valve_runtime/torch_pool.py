# SPDX-License-Identifier: Apache-2.0
"""Lets a program on a GPU allocate tensors in the arena: a torch MemPool over libvalve's allocator.

Why it exists: for programs that are none of the engines with a plugin. (The plugins take one tensor over
the whole arena instead; `torch_arena` says why.) torch asks a pluggable allocator for large pieces and keeps
them; everything that is allocated outside of `in_arena` goes the usual way.

What the caller must know:
* nothing may be written where nothing is granted: make tensors with `torch.empty`, not `torch.zeros`. A slab
  that is granted reads as zeros.
* torch asks for whole multiples of 2 MiB and, for a small tensor, for 20 MiB that several share. Pieces start
  at slabs. A torch that can be told not to split a piece (`no_split`) is told, so that a freed one is not
  handed out in parts; with an older one only tensors of one size may be freed and made again.
* leave `expandable_segments` off (PYTORCH_CUDA_ALLOC_CONF): several versions of torch refuse pools with it.

Threading: the thread that allocates. torch is imported when needed, never before. Not yet tried on a GPU:
with a real torch only as far as it goes without one.

    PoolUnsupported    this process has no libvalve, or this torch no memory pools
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ALLOCATE, FREE = "valve_torch_alloc", "valve_torch_free"


class PoolUnsupported(Exception):
    """The message says what to do."""


def library(maps: Path = Path("/proc/self/maps")) -> str:
    """The path of the libvalve in this process. Raises PoolUnsupported."""
    for line in maps.read_text().splitlines():
        path = line.partition("/")[2]
        if Path(path).name.startswith("libvalve-"):
            return "/" + path
    raise PoolUnsupported("libvalve is not in this process: start it with `valve run`")


@cache
def pool() -> Any:
    """The MemPool over the arena; one per process. Raises PoolUnsupported."""
    import torch

    if not hasattr(torch.cuda, "MemPool"):
        raise PoolUnsupported(f"torch {torch.__version__} has no torch.cuda.MemPool: use torch 2.5 or later")
    allocator = torch.cuda.memory.CUDAPluggableAllocator(library(), ALLOCATE, FREE).allocator()
    if "no_split" in inspect.signature(torch.cuda.MemPool).parameters:
        return torch.cuda.MemPool(allocator, no_split=True)
    return torch.cuda.MemPool(allocator)


@contextmanager
def in_arena() -> Iterator[None]:
    """CUDA tensors made by this thread meanwhile lie in the arena, in the order in which they are made."""
    import torch

    with torch.cuda.use_mem_pool(pool()):
        yield
