# SPDX-License-Identifier: Apache-2.0
"""Managers come and go: a warm-up, the end of a generation thread, the next manager, a request that waits."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest
from cb_stand_ins import BLOCKS, Engine

from valve_runtime.elastic import DemandSettings
from valve_runtime.transformers_cb import Adapter

SLAB = 10


class World:
    """An adapter whose arena an engine's cache has; `managers` of it and of others."""

    def __init__(self, granted: int = BLOCKS, *, urgent: bool = False) -> None:
        self.engine = Engine(granted)
        self.link = self.engine.link
        self.adapter = Adapter(self.link, DemandSettings(urgent=urgent))
        self.adapter._pool, self.adapter._tenant = self.engine.elastic, self.engine.tenant
        self.adapter._cache, self.adapter._placed = self.engine.cache, [(0x1000, BLOCKS * SLAB)]

    def manager(self, processor: Any = None) -> Manager:
        """One that has made its processor: this engine, or another with a cache of its own."""
        made = Manager()
        made.batch_processor = self.adapter.create_processor(lambda _: processor or self.engine, made)
        return made

    def told(self) -> list[str]:
        return [what for what, _ in self.link.said]


class Manager:
    def __init__(self) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.batch_processor: Any = None


@pytest.fixture
def world() -> World:
    return World()


def test_after_a_warm_up_nothing_is_free_that_was_not_granted() -> None:
    world = World(granted=6)

    def reset(cache: Any) -> None:
        cache.pool.free_sectors[:] = range(2, BLOCKS)

    world.adapter.reset_cache(reset, world.engine.cache)
    assert sorted(world.engine.free) == [2, 3, 4, 5]
    other = SimpleNamespace(pool=SimpleNamespace(free_sectors=[]))
    world.adapter.reset_cache(reset, other)
    assert len(other.pool.free_sectors) == BLOCKS - 2, "a cache that is not on the arena has all of its own"


def test_the_end_of_the_generation_thread_is_the_end_of_busy(world: World) -> None:
    manager = world.manager()
    world.adapter.add_request(lambda _: "request", manager)

    def fails(manager: Any) -> None:
        assert world.told() == ["busy"]
        world.engine.run("request", 2)
        world.adapter._settle()
        assert world.told() == ["busy"], "it computes"
        raise RuntimeError("a step failed")

    with pytest.raises(RuntimeError, match="a step failed"):
        world.adapter.run(fails, manager)
    assert world.told()[-1] == "idle"
    assert world.adapter.add_request(lambda _: None, manager) is None
    assert world.told()[-2:] == ["busy", "idle"], "a request that is dropped"


def test_a_manager_that_is_stopped_gives_the_arena_back(world: World) -> None:
    owner = world.manager()

    def keeps(manager: Any) -> None:
        """keep_for_next_session"""

    def ends(manager: Any) -> None:
        manager.batch_processor = None

    other = world.manager(SimpleNamespace(cache=object(), scheduler=None))
    for stop, which in ((keeps, owner), (ends, other)):
        world.adapter.stop(stop, which)
        assert world.link.said == []
    world.adapter.stop(ends, owner)
    assert world.link.said == [
        ("want", 0), *(("give back", slab) for slab in range(BLOCKS)), ("unplace", 0x1000),
    ]  # fmt: skip
    world.adapter.stop(ends, owner)
    assert world.told().count("unplace") == 1


def test_one_that_is_stopped_while_it_runs_gives_it_back_at_its_end(world: World) -> None:
    manager = world.manager()

    def stopped_meanwhile(manager: Any) -> None:
        manager.batch_processor = None
        world.adapter.stop(lambda _: None, manager)
        assert "unplace" not in world.told()

    world.adapter.run(stopped_meanwhile, manager)
    assert world.told()[-1] == "unplace"


@pytest.mark.parametrize(
    ("what", "urgent", "at_once"),
    [("online waits for it here", True, True), ("offline looks again later", False, False)],
)
def test_a_request_for_which_nothing_is_free(what: str, urgent: bool, at_once: bool) -> None:
    """It comes out of the queue only when the engine looks: what it needs could not be asked for before."""
    world = World(granted=2, urgent=urgent)
    engine: Any = world.engine
    world.link.to_grant = [2, 3]
    engine.has_pending_requests = lambda: bool(engine.scheduler.waiting_requests)

    def prepare(processor: Any) -> bool:
        request = SimpleNamespace(initial_tokens=[1] * 40, max_new_tokens=10)
        engine.scheduler.waiting_requests["request"] = request
        return len(engine.free) >= 2

    assert world.adapter.prepare_next_batch(prepare, engine) is at_once, what
    assert ("want" in world.told()) is at_once
