# SPDX-License-Identifier: Apache-2.0
"""Which outputs of a batch are believed when blocks are lost while batches are in flight.

On a GPU two batches are: one whose outputs are awaited, and one that was launched behind it. The stand-ins
have what CacheTenant touches of transformers; the real ones are in the engines lane.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from valve_runtime.elastic import GRANTED, LOST, DemandSettings, ElasticPool, RuntimeFault
from valve_runtime.geometry import Region, build
from valve_runtime.transformers_cb import Adapter, CacheTenant

BLOCKS = 10


class State:
    """A request: transformers' RequestState."""

    def __init__(self, name: str, blocks: list[int]) -> None:
        self.request_id, self.blocks = name, blocks
        self.position_offset = 5

    def create_equivalent_initial_request(self) -> State:
        return State(self.request_id, [])


class Link:
    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []

    def poll(self) -> tuple[int, int] | None:
        return self.events.pop(0) if self.events else None

    def count(self, counter: int, n: int) -> None: ...


class Engine:
    """A processor with a scheduler, a cache and inputs and outputs; one block is one slab."""

    def __init__(self) -> None:
        self.link = Link()
        self.free = list(range(2, BLOCKS))
        self.table: dict[str, list[int]] = {}
        ledger = SimpleNamespace(block_to_hash={}, hash_to_block={}, cached_blocks={})
        allocator = SimpleNamespace(block_table=self.table, ledger=ledger, index=0)
        pool = SimpleNamespace(free_sectors=self.free, try_to_free_sectors=lambda: None)
        self.cache = SimpleNamespace(cache_allocators={"full": allocator}, pool=pool)
        self.scheduler: Any = SimpleNamespace(
            active_requests={}, waiting_requests={}, waiting_requests_order=_Order(),
            schedule_batch=lambda: None, finish_request=self._finish,
        )  # fmt: skip
        self.outputs: list[Any] = []
        self.during: list[tuple[int, int]] = []
        """what the device loses while a batch is awaited"""
        self.inputs_and_outputs: Any = SimpleNamespace(prepare_batch_update=self._await, io_pairs=())
        elastic = ElasticPool(build([Region(0, 1, 0, 10, 10)], BLOCKS, 10, BLOCKS), pinned=(0, 1))
        elastic.apply([(GRANTED, slab) for slab in range(BLOCKS)])
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


def batch(*states: State, prefilling: tuple[State, ...] = ()) -> Any:
    futures = [SimpleNamespace(state=s, has_new_token=s not in prefilling) for s in states]
    return futures, [100 + n for n, f in enumerate(f for f in futures if f.has_new_token)], None


def test_nothing_lost_everything_is_believed() -> None:
    engine = Engine()
    a, b = engine.run("a", 2), engine.run("b", 3)
    engine.outputs = [batch(a, b)]
    assert engine.update() == [("a", 100), ("b", 101)]
    assert engine.tenant.accepted == 2


def test_what_is_lost_while_a_batch_is_awaited_counts() -> None:
    """The wait for the device is inside: a look before it would believe what was computed from garbage."""
    engine = Engine()
    a, b, c = engine.run("a", 2), engine.run("b", 3), engine.run("c", 4)
    engine.outputs = [batch(a, b, c)]
    engine.during = [(LOST, 3)]
    assert engine.update() == [("a", 100), ("c", 102)]
    assert list(engine.scheduler.waiting_requests) == ["b"]
    assert 3 not in engine.free


def test_every_batch_in_flight_is_void_for_a_request_that_lost_blocks() -> None:
    """Two were launched with the old request; its successor of the same name is believed again."""
    engine = Engine()
    a, b = engine.run("a", 2), engine.run("b", 3)
    engine.outputs = [batch(a, b), batch(b, a)]
    engine.during = [(LOST, 3)]
    assert engine.update() == [("a", 100)]
    successor = engine.scheduler.waiting_requests.pop("b")
    assert successor is not b
    again = engine.run("b", 5)
    assert engine.update() == [("a", 101)], "the batch behind it ran with the lost block too"
    assert "b" in engine.scheduler.active_requests, "and does not end the successor"
    engine.outputs = [batch(again, a)]
    assert engine.update() == [("b", 100), ("a", 101)]


def test_tokens_stay_with_their_requests_where_one_gives_none() -> None:
    engine = Engine()
    a, b, c = engine.run("a", 2), engine.run("b", 3), engine.run("c", 4)
    engine.outputs = [batch(a, b, c, prefilling=(a,))]
    engine.during = [(LOST, 3)]
    assert engine.update() == [("c", 101)]


def test_a_loss_before_the_next_batch_is_made_voids_the_one_in_flight() -> None:
    engine = Engine()
    a, b = engine.run("a", 2), engine.run("b", 3)
    engine.outputs = [batch(a, b)]
    engine.link.events = [(LOST, 2)]
    engine.tenant.drain()
    assert engine.update() == [("b", 101)]


def test_an_online_engine_goes_on_without_an_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """P5; an offline one says why it cannot."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(device=lambda d: SimpleNamespace(type=d)))  # type: ignore[arg-type]

    def make(cache: Any, config: Any, continuous_batching_config: Any, device: str, dtype: str) -> None:
        made.append(continuous_batching_config.num_blocks)

    made: list[Any] = []
    batching = SimpleNamespace(num_blocks=128)
    library: Any = SimpleNamespace(
        attach=lambda timeout_ms: True, device=lambda: "nvidia", arena_open=None, last_error=lambda: ""
    )
    for answers, error in ((True, "computes on cpu"), (False, "does not answer")):
        library.attach = lambda timeout_ms, answers=answers: answers
        online = Adapter(library, DemandSettings(urgent=True))
        online.make_cache(make, object(), "config", batching, "cpu", "dtype")
        assert made.pop() == 128
        offline = Adapter(library, DemandSettings())
        with pytest.raises(RuntimeFault, match=error):
            offline.make_cache(make, object(), "config", batching, "cpu", "dtype")
        assert made == []
