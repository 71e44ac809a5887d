# SPDX-License-Identifier: Apache-2.0
"""What torch is asked for, with a torch that only writes it down."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from valve_runtime import torch_pool

MAPS = (
    "7f00-7f01 r--p 0 00:1f 1 /usr/lib/libc.so.6\n7f02-7f03 r-xp 0 00:1f 2 /opt/valve/lib/libvalve-0.1.0.so\n"
)


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    path = tmp_path / "maps"
    path.write_text(MAPS)
    return path


def test_the_library_is_the_one_in_the_process(maps: Path) -> None:
    assert torch_pool.library(maps) == "/opt/valve/lib/libvalve-0.1.0.so"
    maps.write_text(MAPS.splitlines()[0])
    with pytest.raises(torch_pool.PoolUnsupported, match="start it with `valve run`"):
        torch_pool.library(maps)


@pytest.mark.parametrize(
    ("make_pool", "pool"),
    [
        pytest.param(
            lambda inner, no_split=False: ("pool", inner, no_split), ("pool", "allocator", True), id="torch"
        ),
        pytest.param(lambda inner: ("pool", inner), ("pool", "allocator"), id="a torch that always splits"),
        pytest.param(None, None, id="a torch without pools"),
    ],
)
def test_tensors_are_made_in_a_pool_of_our_allocator(
    monkeypatch: pytest.MonkeyPatch, make_pool: Any, pool: Any
) -> None:
    asked: list[Any] = []

    def allocator(*words: str) -> Any:
        asked.append(words)
        return SimpleNamespace(allocator=lambda: "allocator")

    @contextmanager
    def use(pool: Any) -> Iterator[None]:
        asked.append(pool)
        yield
        asked.append("left")

    cuda = SimpleNamespace(memory=SimpleNamespace(CUDAPluggableAllocator=allocator), use_mem_pool=use)
    if make_pool:
        cuda.MemPool = make_pool
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.0"))  # type: ignore[arg-type]
    monkeypatch.setattr(torch_pool, "library", lambda: "libvalve.so")
    torch_pool.pool.cache_clear()
    if not make_pool:
        with pytest.raises(torch_pool.PoolUnsupported, match=r"2\.5 or later"), torch_pool.in_arena():
            pass
        return
    with torch_pool.in_arena():
        asked.append("inside")
    words = ("libvalve.so", "valve_torch_alloc", "valve_torch_free")
    assert asked == [words, pool, "inside", "left"]
    torch_pool.pool.cache_clear()
