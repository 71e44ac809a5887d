# SPDX-License-Identifier: Apache-2.0
"""Lets an engine on a GPU allocate tensors in the arena: a torch MemPool over libvalve's allocator.

Why it exists: on a GPU an engine's KV cache must lie where the agent can grant and reclaim it. torch asks a
pluggable allocator for large pieces and keeps them, which is what a KV cache is; everything that is allocated
outside of `in_arena` goes the usual way.

Threading: the thread that allocates the cache. torch is imported when needed, never before. Not yet tried on
a GPU: on the fake driver there is no torch.

    PoolUnsupported    this process has no libvalve, or this torch no memory pools
"""

from __future__ import annotations

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
    allocator = torch.cuda.memory.CUDAPluggableAllocator(library(), ALLOCATE, FREE)
    return torch.cuda.MemPool(allocator.allocator())


@contextmanager
def in_arena() -> Iterator[None]:
    """CUDA tensors made by this thread meanwhile lie in the arena, in the order in which they are made."""
    import torch

    with torch.cuda.use_mem_pool(pool()):
        yield
