# SPDX-License-Identifier: Apache-2.0
"""Where KV blocks lie in the arena: which slabs a block needs, which blocks a slab carries.

Valve gives and takes memory in slabs; engines count in KV blocks. The map between them
follows from how the engine lays its cache out: a block is usable only while every slab it
overlaps is granted, and is lost as soon as one of them is.

Pure and immutable; built once per engine by the plugin, read from any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """One set of same-shaped layers: layer ``l`` of block ``b`` occupies ``page_bytes``
    from ``offset + l * layer_stride + b * block_stride`` (all bytes from the arena's base)."""

    offset: int
    layers: int
    layer_stride: int
    block_stride: int
    page_bytes: int

    def spans(self, block: int) -> list[tuple[int, int]]:
        """Byte ranges [start, end) of a block, adjacent ones merged."""
        start = self.offset + block * self.block_stride
        if self.layers == 1 or self.layer_stride == self.page_bytes:
            return [(start, start + self.layers * self.page_bytes)]
        return [
            (at, at + self.page_bytes)
            for at in (start + layer * self.layer_stride for layer in range(self.layers))
        ]


@dataclass(frozen=True)
class Geometry:
    """``slabs_of[b]``: slabs that block b overlaps; ``blocks_of[s]``: blocks that overlap slab s."""

    slab_bytes: int
    slabs_of: tuple[tuple[int, ...], ...]
    blocks_of: tuple[tuple[int, ...], ...]

    @property
    def blocks(self) -> int:
        return len(self.slabs_of)

    @property
    def slabs(self) -> int:
        return len(self.blocks_of)

    @property
    def scattered(self) -> bool:
        """True where one block needs slabs from all over the arena (layer-outermost layouts):
        a part of the arena is then worth next to nothing."""
        if not self.slabs_of:
            return False
        first, last = self.slabs_of[0], self.slabs_of[-1]
        if first and first[-1] - first[0] + 1 != len(first):
            return True
        # Layers smaller than a slab leave no gaps: then the first block and the last share most slabs.
        shared = len(set(first) & set(last))
        return self.blocks > 1 and self.slabs_used > 1 and 2 * shared > max(len(first), len(last))

    def slabs_for(self, blocks: int) -> int:
        """Slabs that carry at least ``blocks`` blocks when they are granted from the front."""
        if blocks <= 0:
            return 0
        if self.scattered or blocks >= self.blocks:
            return self.slabs_used
        return self.slabs_of[blocks - 1][-1] + 1

    @property
    def slabs_used(self) -> int:
        """Slabs that carry any block: the arena's tail may carry none."""
        return 1 + max((s for s, blocks in enumerate(self.blocks_of) if blocks), default=-1)


def build(regions: Sequence[Region], blocks: int, slab_bytes: int, slabs: int) -> Geometry:
    """The geometry of ``blocks`` KV blocks in an arena of ``slabs`` slabs.

    Raises ValueError if a block would reach past the arena's end.
    """
    slabs_of: list[tuple[int, ...]] = []
    blocks_of: list[list[int]] = [[] for _ in range(slabs)]
    for block in range(blocks):
        touched = _touched((span for region in regions for span in region.spans(block)), slab_bytes)
        if touched and touched[-1] >= slabs:
            raise ValueError(
                f"KV block {block} needs slab {touched[-1]} of an arena of {slabs} slabs "
                f"({slab_bytes} bytes each): the engine's KV cache is larger than the arena"
            )
        slabs_of.append(touched)
        for slab in touched:
            blocks_of[slab].append(block)
    return Geometry(slab_bytes, tuple(slabs_of), tuple(tuple(b) for b in blocks_of))


def _touched(spans: Iterable[tuple[int, int]], slab_bytes: int) -> tuple[int, ...]:
    found: set[int] = set()
    for start, end in spans:
        found.update(range(start // slab_bytes, (end - 1) // slab_bytes + 1))
    return tuple(sorted(found))
