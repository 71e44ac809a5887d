# SPDX-License-Identifier: Apache-2.0
"""Taking blocks from under a scheduler and giving them back, against a scheduler of a few lines.

The real one is exercised in the engines lane; here every path has a case, also those that need a race.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from valve_runtime.elastic import GRANTED, LOST, DemandSettings, ElasticPool
from valve_runtime.geometry import Region, build
from valve_runtime.vllm_kv import PAUSED, KvTenant

BLOCKS = 12
BLOCK_SIZE = 4
ONE_ON_ONE = build([Region(0, 1, 0, 10, 10)], BLOCKS, 10, BLOCKS)  # block n is slab n


class Block:
    def __init__(self, index: int) -> None:
        self.block_id = index
        self.ref_cnt = 0
        self.is_null = index == 0
        self.hashed = False


class FreeQueue(list[Block]):
    def get_all_free_blocks(self) -> list[Block]:
        return list(self)


class BlockPool:
    def __init__(self) -> None:
        self.blocks = [Block(n) for n in range(BLOCKS)]
        self.free_block_queue = FreeQueue(self.blocks[1:])

    def evict_blocks(self, indices: set[int]) -> None:
        for index in indices:
            self.blocks[index].hashed = False

    def take(self, *indices: int) -> None:
        for index in indices:
            block = self.blocks[index]
            if block.ref_cnt == 0:
                self.free_block_queue.remove(block)
            block.ref_cnt += 1
            block.hashed = True

    def release(self, indices: list[int]) -> None:
        for index in indices:
            self.blocks[index].ref_cnt -= 1
            if self.blocks[index].ref_cnt == 0:
                self.free_block_queue.append(self.blocks[index])


class Request(SimpleNamespace):
    request_id: str
    blocks: list[int]


class Scheduler:
    """What KvTenant touches of vLLM's."""

    def __init__(self) -> None:
        self.block_size, self.max_num_running_reqs, self.max_model_len = BLOCK_SIZE, 8, 64
        self.running: list[Any] = []
        self.waiting: list[Any] = []
        self.kv_holding_waiting: list[Any] = []
        self.requests: dict[str, Any] = {}
        self.num_waiting_for_streaming_input = 0
        self.prev_step_scheduled_req_ids: set[str] = set()
        self.pool = BlockPool()
        self.kv_cache_manager = SimpleNamespace(
            block_pool=self.pool, get_block_ids=lambda name: ([*self.requests[name].blocks],), free=self._free
        )
        self.preempted: list[str] = []

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), len(self.waiting)

    def run(self, name: str, *blocks: int, computed: int = 0, in_flight: int = 0) -> None:
        request = Request(
            request_id=name, blocks=list(blocks), num_computed_tokens=computed,
            num_in_flight_tokens=in_flight, num_prompt_tokens=4, max_tokens=8, num_output_tokens=0,
            sampling_params=SimpleNamespace(prompt_logprobs=None), status=SimpleNamespace(name="RUNNING"),
        )  # fmt: skip
        self.pool.take(*blocks)
        self.running.append(request)
        self.requests[name] = request
        self.prev_step_scheduled_req_ids.add(name)

    def pause(self, name: str, status: str = PAUSED) -> Any:
        """A streaming session answered its chunk."""
        session = self.requests[name]
        self.running.remove(session)
        self.num_waiting_for_streaming_input = int(status == PAUSED)
        self.kv_holding_waiting.append(session)
        session.status = SimpleNamespace(name=status)
        return session

    def _free(self, request: Any) -> None:
        self.pool.release(request.blocks)
        request.blocks = []

    def _preempt_request(self, request: Any, now: float, drop_stale_output: bool) -> None:
        assert drop_stale_output
        assert request not in self.running
        self._free(request)
        self.waiting.insert(0, request)
        self.preempted.append(request.request_id)


class Link:
    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.counted = [0] * 5
        self.returned: list[int] = []
        self.wants: list[int] = []

    def poll(self) -> tuple[int, int] | None:
        return self.events.pop(0) if self.events else None

    def count(self, counter: int, n: int) -> None:
        self.counted[counter] += n

    def want(self, total: int, urgent: bool) -> None:
        self.wants.append(total)

    def give_back(self, slab: int) -> bool:
        self.returned.append(slab)
        return True

    def ledger_begin(self) -> bool:
        return False


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def tenant(scheduler: Scheduler, link: Link, held: range, runner: Any = None, **settings: Any) -> KvTenant:
    pool = ElasticPool(ONE_ON_ONE, pinned=(0,))
    pool.apply([(GRANTED, slab) for slab in held])
    backing: Any = SimpleNamespace(link=link, pool=pool, settings=DemandSettings(**settings), runner=runner)
    return KvTenant(scheduler, backing)


def free(scheduler: Scheduler) -> set[int]:
    return {block.block_id for block in scheduler.pool.free_block_queue}


def test_starts_with_what_is_granted(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(4))
    assert free(scheduler) == {1, 2, 3}
    assert made.withdrawn == set(range(4, BLOCKS))


def test_granted_blocks_come_back(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(4))
    link.events = [(GRANTED, 5), (GRANTED, 6)]
    made.drain()
    assert free(scheduler) == {1, 2, 3, 5, 6}


def test_owners_are_preempted_in_their_order_and_lost_blocks_leave(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1, 2, computed=8)
    scheduler.run("b", 3, 4, computed=7)
    scheduler.run("c", 5, computed=3)
    link.events = [(LOST, 2), (LOST, 5)]
    made.drain()
    assert [r.request_id for r in scheduler.running] == ["b"]
    assert [r.request_id for r in scheduler.waiting] == ["a", "c"]
    assert free(scheduler) == {1, 6, 7, 8, 9, 10, 11}
    assert made.withdrawn == {2, 5}
    assert scheduler.prev_step_scheduled_req_ids == {"b"}
    assert link.counted[2:] == [2, 2, 11]  # requests, blocks, tokens


def test_a_shared_prefix_takes_all_its_owners(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1, 2)
    scheduler.run("b", 1, 3)
    link.events = [(LOST, 1)]
    made.drain()
    assert not scheduler.running
    assert free(scheduler) == set(range(2, BLOCKS))
    assert made.withdrawn == {1}


def test_a_free_block_loses_its_hash_too(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.pool.blocks[7].hashed = True  # a cached prefix nobody uses
    link.events = [(LOST, 7)]
    made.drain()
    assert not scheduler.pool.blocks[7].hashed
    assert made.withdrawn == {7}
    assert link.counted[2:] == [0, 0, 0]


def test_what_a_victim_wrote_in_this_step_is_forgotten_and_so_are_its_readers(
    scheduler: Scheduler, link: Link
) -> None:
    """a lost block 1 during the step that filled block 3 (tokens 8..11); b already shares block 3 through a
    copy of the prefix of its own (2), c shares only what was sound before."""
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1, 6, 3, computed=12, in_flight=4)
    scheduler.run("b", 2, 7, 3, 8, computed=13, in_flight=1)
    scheduler.run("c", 6, 9, computed=5, in_flight=1)
    link.events = [(LOST, 1)]
    made.drain()
    assert [r.request_id for r in scheduler.running] == ["c"]
    assert not scheduler.pool.blocks[3].hashed, "computed from garbage"
    assert not scheduler.pool.blocks[8].hashed, "computed from what was computed from garbage"
    assert scheduler.pool.blocks[6].hashed, "sound before the step"
    assert scheduler.pool.blocks[7].hashed
    assert made.withdrawn == {1}, "the others keep their memory"


def test_lost_and_granted_again_before_anyone_looked(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1)
    scheduler.pool.blocks[4].hashed = True
    link.events = [(LOST, 1), (LOST, 4), (GRANTED, 1), (GRANTED, 4)]
    made.drain()
    assert [r.request_id for r in scheduler.waiting] == ["a"]
    assert not scheduler.pool.blocks[4].hashed
    assert free(scheduler) == set(range(1, BLOCKS))
    assert not made.withdrawn


def test_a_block_still_referenced_waits_in_limbo(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.pool.take(5)  # held by something that is no request (a copy in progress)
    link.events = [(LOST, 5)]
    made.drain()
    assert made.limbo == {5}
    scheduler.pool.release([5])
    made.drain()
    assert made.withdrawn == {5}
    assert not made.limbo
    assert 5 not in free(scheduler)


def test_a_paused_session_that_lost_blocks_starts_over(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1, 2, computed=8)
    scheduler.pause("a")
    link.events = [(LOST, 2)]
    made.drain()
    assert scheduler.requests["a"].num_computed_tokens == 0
    assert not scheduler.preempted
    assert free(scheduler) == set(range(1, BLOCKS)) - {2}


def test_a_paused_session_that_lost_blocks_keeps_its_tokens(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1, 2, computed=7)
    session = scheduler.pause("a")
    link.events = [(LOST, 2)]
    made.drain()
    made._preempt([session])  # once more, with nothing left to lose
    with made.at_frontier(session):
        assert session.num_computed_tokens == 7, "as many tokens stay"
    assert session.num_computed_tokens == 0, "all are computed again"
    session.num_computed_tokens = 3
    with made.at_frontier(session):
        assert session.num_computed_tokens == 3, "the next chunk has a frontier of its own"
    assert session.num_computed_tokens == 3


def test_a_paused_session_that_lost_blocks_needs_none_and_leaves_nothing(
    scheduler: Scheduler, link: Link
) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1, 2, computed=7)
    session = scheduler.pause("a")
    link.events = [(LOST, 2)]
    made.drain()
    scheduler.waiting.append(session)  # where vLLM puts what holds no blocks
    made.ask()
    assert made._needed == 0
    made.departing(session)
    assert not made._frontiers


def test_a_session_that_has_its_chunk_needs_memory_also_after_a_loss(
    scheduler: Scheduler, link: Link
) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1, 2, computed=7)
    session = scheduler.pause("a", "WAITING")
    link.events = [(LOST, 2)]
    made.drain()
    assert session.num_computed_tokens == 0
    scheduler.waiting.append(session)
    made.ask()
    assert made._needed == 3
    with made.at_frontier(session):
        assert session.num_computed_tokens == 0


class Runner:
    """What vLLM's first model runner keeps of its requests."""

    def __init__(self, *names: str) -> None:
        self.num_prompt_logprobs: dict[str, int] = {}
        self.input_batch = SimpleNamespace(vocab_size=5000)
        self.pieces: dict[str, list[str]] = {name: ["void"] for name in names}
        self.requests = {
            name: SimpleNamespace(pooling_states=SimpleNamespace(clean=self.pieces[name].clear))
            for name in names
        }


#   description, prompt_logprobs, output tokens, a streaming session, asked for again
PROMPTS = [
    ("none asked for", None, 0, False, {}),
    ("none besides the prompt's own", 0, 0, False, {"a": 0}),
    ("the best two", 2, 0, False, {"a": 2}),
    ("all", -1, 0, False, {"a": 5000}),
    ("they went out with the first token", 2, 1, False, {}),
    ("a session", 2, 0, True, {}),
]


@pytest.mark.parametrize(
    ("asked", "outputs", "resumable", "registered"), [c[1:] for c in PROMPTS], ids=[c[0] for c in PROMPTS]
)
def test_prompt_logprobs_of_a_void_step_are_asked_for_again(
    scheduler: Scheduler, link: Link, asked: int | None, outputs: int, resumable: bool,
    registered: dict[str, int],
) -> None:  # fmt: skip
    runner = Runner()
    made = tenant(scheduler, link, range(BLOCKS), runner)
    scheduler.run("a", 1, computed=4, in_flight=4)
    request = scheduler.requests["a"]
    request.sampling_params.prompt_logprobs = asked
    request.num_output_tokens, request.resumable = outputs, resumable
    link.events = [(LOST, 1)]
    made.drain()
    assert runner.num_prompt_logprobs == {}, "a step whose sampling waits for a grammar would take it away"
    made.scheduled()
    assert runner.num_prompt_logprobs == registered
    runner.num_prompt_logprobs.clear()
    made.scheduled()
    assert runner.num_prompt_logprobs == {}, "once"


def test_pieces_of_a_void_prompt_are_forgotten(scheduler: Scheduler, link: Link) -> None:
    runner = Runner("a", "b")
    made = tenant(scheduler, link, range(BLOCKS), runner)
    scheduler.run("a", 1, computed=4, in_flight=4)
    scheduler.run("b", 2, computed=4, in_flight=4)
    for request in scheduler.running:
        request.sampling_params = None
    link.events = [(LOST, 1)]
    made.drain()
    runner.pieces["a"].append("of a step in flight")
    made.scheduled()
    assert runner.pieces == {"a": [], "b": ["void"]}


def test_what_ended_meanwhile_is_left_alone(scheduler: Scheduler, link: Link) -> None:
    runner = Runner("a")
    made = tenant(scheduler, link, range(BLOCKS), runner)
    scheduler.run("a", 1, computed=4, in_flight=4)
    scheduler.requests["a"].sampling_params.prompt_logprobs = 2
    link.events = [(LOST, 1)]
    made.drain()
    del scheduler.requests["a"]  # aborted
    made.scheduled()
    assert runner.num_prompt_logprobs == {}


def test_the_second_model_runner_needs_nothing(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS), SimpleNamespace())
    scheduler.run("a", 1, computed=4, in_flight=4)
    scheduler.requests["a"].sampling_params.prompt_logprobs = 2
    link.events = [(LOST, 1)]
    made.drain()
    made.scheduled()


def test_arrivals_ask_before_the_scheduler_knows(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(2), urgent=True)
    link.wants.clear()
    made.arriving(Request(request_id="a", num_prompt_tokens=9, max_tokens=3))  # 3 blocks, 1 is there
    assert link.wants == [5]
    made.arriving(Request(request_id="b", num_prompt_tokens=100, max_tokens=100))  # at most 64 tokens
    assert link.wants[-1] == BLOCKS


def test_surplus_is_returned_and_cannot_be_used_any_more(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS), idle_return_s=0.0, return_every_s=0.0, floor_blocks=2)
    scheduler.run("a", 11)
    scheduler.requests["a"].max_tokens = 0  # needs one block
    made.ask()
    assert sorted(link.returned) == list(range(3, 11))  # 0 is pinned, 11 in use: with 1 the floor; one slack
    assert free(scheduler) == {1, 2}
    assert made.withdrawn == set(range(3, 11))


def test_an_idle_engine_takes_an_unfulfilled_want_back(scheduler: Scheduler, link: Link) -> None:
    """Else the agent would grant it some time, to an engine that neither uses nor returns it."""
    made = tenant(scheduler, link, range(3), idle_return_s=0.0, return_every_s=0.0)
    made.arriving(Request(request_id="a", num_prompt_tokens=36, max_tokens=4))
    made.arrived("a")
    scheduler.waiting.append(Request(request_id="a", num_prompt_tokens=36, max_tokens=4))
    made.ask()
    assert link.wants[-1] > 10
    assert not made.over_provisioned, "it needs them"
    scheduler.waiting.clear()  # aborted
    for _ in range(100):
        made.ask()
        if not made.over_provisioned:
            break
    else:
        pytest.fail("it is woken for ever")
    assert link.wants[-1] == made.demand.enough_for(0)


def test_a_request_that_came_and_went_between_two_counts(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(3), idle_return_s=0.0, return_every_s=0.0)
    made.ask()
    made.arriving(Request(request_id="a", num_prompt_tokens=36, max_tokens=4))
    made.arrived("a")  # and aborted
    made.ask()
    assert made._needed == 0


def test_an_engine_at_rest_is_not_woken(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS), idle_return_s=0.0, return_every_s=0.0)
    made.ask()
    assert link.returned
    assert len(made.pool.held) == made.demand.enough_for(0), "what surplus() leaves"
    assert not made.over_provisioned


def test_what_left_in_flight_is_void_if_its_blocks_are_lost(scheduler: Scheduler, link: Link) -> None:
    """vLLM preempts requests itself and takes their outputs in flight for good; what they wrote is hashed."""
    runner = Runner()
    made = tenant(scheduler, link, range(BLOCKS), runner)
    scheduler.run("a", 1, 2, 3, computed=9, in_flight=1)
    scheduler.requests["a"].sampling_params.prompt_logprobs = 2
    scheduler.run("b", 4, 5, computed=6, in_flight=1)
    made.scheduled()
    made.scheduled()
    for request in list(scheduler.running):
        made.departing(request)
        scheduler.running.remove(request)
        scheduler.pool.release(request.blocks)
        request.blocks, request.num_stale_output_tokens, request.drop_stale_output = [], 1, False
    made.processed()  # the first of two steps; they are in the second
    link.events = [(LOST, 1)]
    made.drain()
    a, b = scheduler.requests["a"], scheduler.requests["b"]
    assert (a.drop_stale_output, b.drop_stale_output) == (True, False)
    assert [scheduler.pool.blocks[n].hashed for n in (1, 2, 3, 4, 5)] == [False, True, False, True, True]
    assert scheduler.preempted == []
    assert link.counted[2] == 0
    made.scheduled()
    assert runner.num_prompt_logprobs == {"a": 2}


def test_what_left_is_forgotten_when_its_step_is_over(scheduler: Scheduler, link: Link) -> None:
    made = tenant(scheduler, link, range(BLOCKS))
    scheduler.run("a", 1, 2, computed=5, in_flight=1)
    scheduler.run("b", 3, computed=3)
    made.scheduled()
    a, b = scheduler.running
    made.departing(a)
    made.departing(b)  # has nothing in flight
    scheduler.running.clear()
    scheduler.pool.release(a.blocks)
    a.num_stale_output_tokens, a.drop_stale_output = 1, False
    made.processed()
    link.events = [(LOST, 1)]
    made.drain()
    assert a.drop_stale_output is False
