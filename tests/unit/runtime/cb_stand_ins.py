# SPDX-License-Identifier: Apache-2.0
"""What CacheTenant and Adapter touch of transformers' continuous batching; the real thing is in the engines
lane."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from valve_runtime.elastic import GRANTED, DemandSettings, ElasticPool
from valve_runtime.geometry import Region, build
from valve_runtime.transformers_cb import CacheTenant

BLOCKS = 10


class State:
    """A request: transformers' RequestState."""

    def __init__(self, name: str, blocks: list[int]) -> None:
        self.request_id, self.blocks = name, blocks
        self.position_offset = 5

    def create_equivalent_initial_request(self) -> State:
        return State(self.request_id, [])


class Link:
    """libvalve; `said` is what the agent would hear."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.said: list[tuple[str, int]] = []
        self.to_grant: list[int] = []
        """Slabs that come with the next want."""

    def poll(self) -> tuple[int, int] | None:
        return self.events.pop(0) if self.events else None

    def count(self, counter: int, n: int) -> None: ...

    def busy(self) -> None:
        self.said.append(("busy", 0))

    def idle(self, decode_gap_ns: int) -> None:
        self.said.append(("idle", 0))

    def want(self, total_slabs: int, urgent: bool) -> None:
        self.said.append(("want", total_slabs))
        self.events += [(GRANTED, slab) for slab in self.to_grant]
        self.to_grant = []

    def give_back(self, slab: int) -> bool:
        self.said.append(("give back", slab))
        return True

    def unplace(self, address: int, nbytes: int) -> None:
        self.said.append(("unplace", address))

    def ledger_begin(self) -> bool:
        return False


class Engine:
    """A processor with a scheduler, a cache and inputs and outputs; one block is one slab."""

    def __init__(self, granted: int = BLOCKS) -> None:
        self.link = Link()
        self.free = list(range(2, BLOCKS))
        self.table: dict[str, list[int]] = {}
        ledger = SimpleNamespace(block_to_hash={}, hash_to_block={}, cached_blocks={})
        allocator = SimpleNamespace(block_table=self.table, ledger=ledger, index=0, tokens_per_page=32)
        pool = SimpleNamespace(free_sectors=self.free, try_to_free_sectors=lambda: None)
        self.cache = SimpleNamespace(cache_allocators={"full": allocator}, pool=pool)
        self.scheduler: Any = SimpleNamespace(
            active_requests={}, waiting_requests={}, waiting_requests_order=_Order(),
            schedule_batch=lambda: None, finish_request=self._finish, max_requests_per_batch=8,
        )  # fmt: skip
        self.outputs: list[Any] = []
        self.during: list[tuple[int, int]] = []
        """what the device loses while a batch is awaited"""
        self.inputs_and_outputs: Any = SimpleNamespace(prepare_batch_update=self._await, io_pairs=())
        elastic = ElasticPool(build([Region(0, 1, 0, 10, 10)], BLOCKS, 10, BLOCKS), pinned=(0, 1))
        elastic.apply([(GRANTED, slab) for slab in range(granted)])
        self.elastic = elastic
        self.tenant = CacheTenant(self.link, elastic, DemandSettings(), self)

    def run(self, name: str, *blocks: int) -> State:
        state = State(name, list(blocks))
        self.scheduler.active_requests[name] = state
        self.table[name] = list(blocks)
        self.free[:] = [b for b in self.free if b not in blocks]
        return state

    def _finish(self, name: str) -> None:
        self.free.extend(self.table.pop(name))
        del self.scheduler.active_requests[name]

    def _await(self) -> Any:
        self.link.events += self.during
        self.during = []
        return self.outputs.pop(0)

    def update(self) -> list[tuple[str, int]]:
        """What transformers' update_batch is given: (request, token)."""
        futures, tokens, _ = self.inputs_and_outputs.prepare_batch_update()
        return [
            (future.state.request_id, token)
            for future, token in zip((f for f in futures if f.has_new_token), tokens, strict=True)
        ]


class _Order(list[str]):
    def appendleft(self, name: str) -> None:
        self.insert(0, name)
