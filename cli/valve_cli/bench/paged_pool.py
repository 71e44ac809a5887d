# SPDX-License-Identifier: Apache-2.0
"""A simulated offline engine with a paged KV cache: where its requests' blocks lie, over time.

Why it exists: how good a choice of victims is depends on how blocks are spread over slabs,
and that comes from how engines behave: free blocks are reused oldest first, requests start
and end at different times, and some share a prefix.  ``valve bench victims`` takes its slabs
from here.  One thread, deterministic for a seed; a step is one decode iteration.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from random import Random

from valve_agent.policy.victims import SlabView

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Layout:
    """How blocks lie on slabs.

    A *column* of ``blocks`` neighbouring blocks lies on the same ``slabs`` slabs: 1 if all
    layers of a block are stored together, the number of layers if each layer is a tensor.
    """

    name: str
    blocks: int
    slabs: int


@dataclass
class _Running:
    blocks: list[int]
    tokens: int
    end_tokens: int


class PagedEngine:
    """One engine: ``columns`` of a layout, up to ``slots`` requests at once.

    prefix_share: the share of requests that begin with one of four 256-token prefixes, whose
    blocks they own together.
    """

    def __init__(
        self, tenant: int, layout: Layout, columns: int, slots: int, prefix_share: float, random: Random
    ) -> None:
        self._tenant = tenant
        self._layout = layout
        self._columns = columns
        self._share = prefix_share
        self._random = random
        self._free = deque(range(1, columns * layout.blocks))  # block 0 is the engine's null block
        self._users = [0] * (columns * layout.blocks)
        self._written = [0] * (columns * layout.blocks)
        self._step = 0
        self._prefixes: list[list[int]] = [[], [], [], []]
        self._slots: list[_Running | None] = [None] * slots

    def run(self, steps: int) -> None:
        """Let time pass: finished requests leave, new ones start, the others decode a token."""
        for _ in range(steps):
            self._step += 1
            for slot, request in enumerate(self._slots):
                if request is None:
                    self._slots[slot] = self._start()
                elif request.tokens >= request.end_tokens or not self._grow(request, request.tokens + 1):
                    self._drop(request.blocks)
                    self._slots[slot] = None

    def slabs(self) -> list[SlabView]:
        """What the ledger would say now, in the order of the grants (slab numbers)."""
        owners = [0] * self._columns
        last_use = [0] * self._columns
        for slot, request in enumerate(self._slots):
            for block in request.blocks if request else ():
                column = block // self._layout.blocks
                owners[column] |= 1 << slot
        for block, step in enumerate(self._written):
            column = block // self._layout.blocks
            last_use[column] = max(last_use[column], step)
        return [
            SlabView(
                self._tenant, layer * self._columns + column, owners[column], column == 0, last_use[column]
            )
            for layer in range(self._layout.slabs)
            for column in range(self._columns)
        ]

    def tokens(self) -> list[int]:
        """Per slot, what losing its request costs."""
        return [request.tokens if request else 0 for request in self._slots]

    def _start(self) -> _Running | None:
        prompt = min(2048, int(self._random.lognormvariate(5.5, 0.8)) + 16)
        output = min(1024, int(self._random.lognormvariate(5.0, 0.8)) + 8)
        request = _Running([], 0, prompt + output)
        prefix = None
        if self._random.random() < self._share:
            prefix = self._prefixes[self._random.randrange(len(self._prefixes))]
            self._take(request, prefix)
            prompt += 256
            request.end_tokens += 256
        if not self._grow(request, prompt):
            self._drop(request.blocks)
            return None
        if prefix is not None and not prefix:
            prefix += request.blocks[: 256 // BLOCK_TOKENS]
        return request

    def _take(self, request: _Running, prefix: list[int]) -> None:
        if prefix and all(self._users[block] for block in prefix):
            for block in prefix:
                self._users[block] += 1
            request.blocks += prefix
        else:
            prefix.clear()  # nobody holds it: its blocks may be another's by now

    def _grow(self, request: _Running, tokens: int) -> bool:
        while len(request.blocks) * BLOCK_TOKENS < tokens:
            if not self._free:
                return False
            block = self._free.popleft()
            self._users[block] = 1
            request.blocks.append(block)
        request.tokens = tokens
        self._written[request.blocks[-1]] = self._step
        return True

    def _drop(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)
