# SPDX-License-Identifier: Apache-2.0
"""Which slabs a block needs, and which blocks a slab carries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_runtime.geometry import Geometry, Region, build

CASES = [
    # description, region, blocks, slab bytes, slabs, slabs of blocks 0.., scattered
    ("one block per slab", Region(0, 1, 0, 10, 10), 3, 10, 3, [(0,), (1,), (2,)], False),
    ("three blocks on two slabs", Region(0, 3, 2, 6, 2), 3, 9, 2, [(0,), (0, 1), (1,)], False),
    ("a block over three slabs", Region(0, 1, 0, 25, 25), 2, 10, 5, [(0, 1, 2), (2, 3, 4)], False),
    ("small blocks share a slab", Region(0, 2, 2, 4, 2), 4, 8, 2, [(0,), (0,), (1,), (1,)], False),
    ("an offset shifts everything", Region(5, 1, 0, 10, 10), 2, 10, 3, [(0, 1), (1, 2)], False),
    ("layer-outermost: a stripe per layer", Region(0, 2, 20, 5, 5), 4, 10, 4,
     [(0, 2), (0, 2), (1, 3), (1, 3)], True),
    ("layers smaller than a slab: no gaps, all of it needed", Region(0, 4, 6, 1, 1), 6, 8, 3,
     [(0, 1, 2)] * 2 + [(0, 1, 2)] * 4, True),
    ("two blocks that share a slab are in one piece", Region(0, 1, 0, 7, 7), 2, 10, 2, [(0,), (0, 1)], False),
    ("padding between pages is not touched", Region(0, 2, 30, 10, 5), 2, 10, 5, [(0, 3), (1, 4)], True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("region", "blocks", "slab", "slabs", "expected", "scattered"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_slabs_of_blocks(
    region: Region, blocks: int, slab: int, slabs: int, expected: list[tuple[int, ...]], scattered: bool
) -> None:
    geometry = build([region], blocks, slab, slabs)
    assert list(geometry.slabs_of) == expected
    assert geometry.scattered is scattered
    for number in range(slabs):
        assert geometry.blocks_of[number] == tuple(b for b, s in enumerate(expected) if number in s)


def test_two_regions_of_one_block_add_up() -> None:
    geometry = build([Region(0, 1, 0, 10, 10), Region(20, 1, 0, 10, 10)], 2, 10, 4)
    assert geometry.slabs_of == ((0, 2), (1, 3))


def test_a_cache_larger_than_its_arena_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than the arena"):
        build([Region(0, 1, 0, 10, 10)], 4, 10, 3)


@given(
    layers=st.integers(1, 6), page=st.integers(1, 9), blocks=st.integers(1, 12), slab=st.integers(1, 16),
    block_outermost=st.booleans(), offset=st.integers(0, 20),
)  # fmt: skip
def test_every_byte_of_a_block_lies_on_its_slabs_and_nowhere_else(
    layers: int, page: int, blocks: int, slab: int, block_outermost: bool, offset: int
) -> None:
    strides = (page, layers * page) if block_outermost else (blocks * page, page)
    region = Region(offset, layers, strides[0], strides[1], page)
    slabs = -(-(offset + layers * blocks * page) // slab)
    geometry: Geometry = build([region], blocks, slab, slabs)
    for block in range(blocks):
        touched = {
            (offset + layer * strides[0] + block * strides[1] + byte) // slab
            for layer in range(layers)
            for byte in range(page)
        }
        assert set(geometry.slabs_of[block]) == touched
