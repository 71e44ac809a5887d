# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache on memory that Valve grants and takes.

Two objects, both in the process that schedules (EngineCore with its worker in-process):

* ``Backing``: the arena, opened when the worker asks how much memory there is, and slipped
  under ``allocate_kv_cache`` as the one backing tensor of all layers.
* ``KvTenant``: one per Scheduler. Drains the arena's events before anything is scheduled and
  before a step's outputs are believed; takes lost blocks out of the block pool, preempts their
  owners, puts granted blocks back; says how much memory the engine could use.

Threading: everything runs on EngineCore's main thread, except ``KvTenant.arriving`` (input
thread). Invariants: a block is in ``withdrawn`` exactly while it is out of the free queue with
a reference count of 1 that no request holds; a lost block that is still referenced after its
owners were preempted waits in ``limbo`` and is withdrawn when its last reference goes.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from valve_runtime import geometry as geo
from valve_runtime.elastic import (
    COUNT_LOST_BLOCKS,
    COUNT_RECOMPUTED,
    COUNT_RECOMPUTED_TOKENS,
    Demand,
    DemandSettings,
    ElasticPool,
    Ledger,
    Link,
    await_pinned,
    drain_events,
)
from valve_runtime.torch_arena import Places, on_arena

if TYPE_CHECKING:
    from valve_runtime._lib import Arena

logger = logging.getLogger("valve.vllm")

NULL_BLOCK = 0
PAUSED = "WAITING_FOR_STREAMING_REQ"
"""vLLM's status of a streaming session that waits for its client."""


class Backing:
    """The arena under the KV cache of this process's engine; one per process."""

    def __init__(self, valve: Any, arena: Arena, settings: DemandSettings, runner: Any = None) -> None:
        """``valve``: libvalve (``_lib.Valve``), as a ``Link`` and as ``torch_arena.Places``.
        ``runner``: the worker's model runner."""
        self.link: Link = valve
        self.places: Places = valve
        self.arena = arena
        self.settings = settings
        self.runner = runner
        self.pool: ElasticPool | None = None

    def allocate(
        self, original: Callable[..., dict[str, Any]], config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """``allocate_kv_cache`` with its buffer on the arena; waits for the null block's slabs."""
        with on_arena(self.places, self.arena, config.kv_cache_tensors[0].size):
            caches = original(config, *args, **kwargs)
        self.pool = self._pool(config, caches)
        await_pinned(self.link, self.pool, self.settings)
        return caches

    def _pool(self, config: Any, caches: dict[str, Any]) -> ElasticPool:
        regions = []
        for tensor in config.kv_cache_tensors:
            view = caches[tensor.layers[0]]
            for piece, page in _pieces(view, config.num_blocks):
                offset, layers = tensor.offset + piece, len(tensor.layers)
                regions.append(geo.Region(offset, layers, tensor.layer_stride, tensor.block_stride, page))
        blocks = geo.build(regions, config.num_blocks, self.arena.slab_bytes, self.arena.slabs)
        if blocks.scattered:
            logger.warning(
                "valve: this KV layout spreads a block over the whole arena; memory is granted and "
                "taken as a whole (a block-outermost layout such as BLHNC avoids this)"
            )
        return ElasticPool(blocks, pinned=(NULL_BLOCK,))


def _pieces(view: Any, blocks: int) -> list[tuple[int, int]]:
    """Where one layer of block 0 lies in a ``[B, H, N, C]`` view of any strides: (offset, bytes) of each
    piece, from its first byte to its last. A backend's kernel may count smaller blocks than the scheduler's:
    then B is a multiple of ``blocks``."""
    item = view.element_size()
    block_stride = view.stride(0) * (view.shape[0] // blocks)
    dims = [(view.shape[0] // blocks, view.stride(0))]
    dims += [(view.shape[d], view.stride(d)) for d in range(1, view.dim())]
    outer = [(size, stride) for size, stride in dims if stride > block_stride]  # such as heads in LHBNC
    inner = sum((size - 1) * stride for size, stride in dims if stride <= block_stride) + 1
    starts = itertools.product(*(range(size) for size, _ in outer))
    offsets = [sum(n * stride for n, (_, stride) in zip(at, outer, strict=True)) for at in starts]
    return [(offset * item, inner * item) for offset in offsets]


class _Departed(NamedTuple):
    """A request whose blocks were freed while steps in flight still read and write them."""

    request: Any
    blocks: list[int]
    sound: int
    """tokens whose KV no step in flight writes"""
    until: int
    """number of the last step that it is in"""


def _begin_anew(runner: Any, request: Any) -> None:
    """Let the model runner forget what void steps left with it for ``request``.

    Runner V1 keeps two things through a preemption: it asks for a prompt's logprobs only until the prompt
    was computed once, and it collects the hidden states of a prompt computed in pieces. Runner V2 is told
    of a request that comes back as of a new one.
    """
    name, sampling = request.request_id, request.sampling_params
    registered = getattr(runner, "num_prompt_logprobs", None)
    # They go out with the first token. Of a streaming session, vLLM registers the first chunk only, and
    # whether this is the first cannot be seen here.
    unsent = request.num_output_tokens == 0 and not getattr(request, "resumable", False)
    if registered is not None and sampling is not None and sampling.prompt_logprobs is not None and unsent:
        every = sampling.prompt_logprobs == -1
        registered[name] = runner.input_batch.vocab_size if every else sampling.prompt_logprobs
    state = getattr(runner, "requests", {}).get(name)
    if state is not None and state.pooling_states is not None:
        state.pooling_states.clean()


class KvTenant:
    """Keeps one Scheduler's block pool true to what is granted."""

    def __init__(self, scheduler: Any, backing: Backing) -> None:
        assert backing.pool is not None
        self._scheduler = scheduler
        self._link = backing.link
        self._settings = backing.settings
        self._runner = backing.runner
        self.pool = backing.pool
        self.demand = Demand(self._link, self.pool, self._settings)
        self.ledger = Ledger(self._link, self.pool)
        self._blocks: Any = scheduler.kv_cache_manager.block_pool
        self._block_size = int(scheduler.block_size)
        self.withdrawn: set[int] = set()
        self.limbo: set[int] = set()
        self._departed: list[_Departed] = []
        self._void: list[Any] = []  # requests with void steps that the model runner has not forgotten yet
        self._frontiers: dict[str, int] = {}  # tokens of paused sessions that lost their blocks
        self._scheduled = self._processed = 0  # steps; those in between are in flight
        self._arriving: dict[str, int] = {}
        self._needed = 0
        self._counted: tuple[int, int, float] = (-1, -1, 0.0)
        for block in self._blocks.blocks:
            if not block.is_null and not self.pool.is_usable(block.block_id):
                self._withdraw(block)
        self.demand.raise_to(self._settings.floor_blocks, time.monotonic(), urgent=False)

    def schedules_for(self, scheduler: Any) -> bool:
        return self._scheduler is scheduler

    def allocates_from(self, block_pool: Any) -> bool:
        return self._blocks is block_pool

    # -- memory that came and went ------------------------------------------------------------

    def drain(self) -> None:
        """Bring the block pool up to date. Before scheduling, and before outputs are believed."""
        events = drain_events(self._link)
        if events:
            change = self.pool.apply(events)
            if change.lost:
                self._lose(change.lost, change.gained)
            for index in sorted(change.gained):
                if index in self.withdrawn:
                    self._restore(self._blocks.blocks[index])
                self.limbo.discard(index)
        if self.limbo:
            for index in [i for i in self.limbo if self._blocks.blocks[i].ref_cnt == 0]:
                self._withdraw(self._blocks.blocks[index])

    def scheduled(self) -> None:
        """A step was scheduled and is about to go to the model runner.

        Here, and not where the loss is noticed: a step whose sampling waits for a grammar passes the model
        runner only after the outputs before it were processed. But all of it is past before the next step
        is scheduled.
        """
        self._scheduled += 1
        for request in self._void:
            if self._scheduler.requests.get(request.request_id) is request:
                _begin_anew(self._runner, request)
        self._void.clear()

    def processed(self) -> None:
        """The outputs of the oldest step in flight were processed."""
        self._processed += 1
        self._departed = [gone for gone in self._departed if gone.until > self._processed]

    def departing(self, request: Any) -> None:
        """vLLM is about to free this request's blocks: it ends, is aborted, or vLLM preempts it for want of
        blocks. What it has in flight vLLM still takes for good."""
        self._frontiers.pop(request.request_id, None)
        if request.num_in_flight_tokens > 0:
            sound = request.num_computed_tokens - request.num_in_flight_tokens
            self._departed.append(_Departed(request, self._block_ids(request), sound, self._scheduled))

    def _lose(self, lost: set[int], gained: set[int]) -> None:
        blocks = self._blocks.blocks
        in_use = {i for i in lost if blocks[i].ref_cnt > 0 and i not in self.withdrawn}
        victims, tainted = self._victims(lost)
        self._blocks.evict_blocks(lost | tainted)
        recomputed_tokens = self._preempt(victims)
        for index in lost - gained:
            if index in self.withdrawn:
                continue
            if blocks[index].ref_cnt == 0:
                self._withdraw(blocks[index])
            else:
                self.limbo.add(index)
        self._link.count(COUNT_LOST_BLOCKS, len(in_use))
        self._link.count(COUNT_RECOMPUTED, len(victims))
        self._link.count(COUNT_RECOMPUTED_TOKENS, recomputed_tokens)
        logger.debug("valve: lost %d blocks, %d in use, %d requests", len(lost), len(in_use), len(victims))

    def _victims(self, lost: set[int]) -> tuple[list[Any], set[int]]:
        """Requests that hold a lost block, and blocks that the step in flight wrote for them.

        What a victim wrote during the step in which its blocks vanished was computed from
        garbage. Such a block may already carry a prefix hash and may already be shared, so it is
        treated as lost too (it keeps its memory, not its contents), until nothing is added. The same
        holds for what departed while it was in flight; such a request is no victim, but its outputs are void.
        """
        suspects = [
            (r, self._block_ids(r), r.num_computed_tokens - r.num_in_flight_tokens, True)
            for r in self._holders()
        ]
        suspects += [(gone.request, gone.blocks, gone.sound, False) for gone in self._departed]
        bad, tainted, victims = set(lost), set[int](), []
        grew = True
        while grew:
            grew = False
            innocent = []
            for request, ids, sound, holds in suspects:
                if bad.isdisjoint(ids):
                    innocent.append((request, ids, sound, holds))
                    continue
                if holds:
                    victims.append(request)
                elif request.num_stale_output_tokens > 0:
                    request.drop_stale_output = True
                    self._void.append(request)
                written = set(ids[max(0, sound) // self._block_size :]) - bad
                tainted |= written
                bad |= written
                grew = True
            suspects = innocent
        return victims, tainted

    def _preempt(self, victims: list[Any]) -> int:
        """Back to the waiting queue, in the order they ran; returns tokens to compute again."""
        if not victims:
            return 0
        scheduler, now, tokens = self._scheduler, time.monotonic(), 0
        self._void += victims
        running = {r.request_id for r in scheduler.running}
        chosen = {r.request_id for r in victims}
        order = [r for r in scheduler.running if r.request_id in chosen]
        scheduler.running = [r for r in scheduler.running if r.request_id not in chosen]
        for request in reversed(order):
            tokens += max(0, request.num_computed_tokens - request.num_in_flight_tokens)
            self.ledger.forget(request.request_id)
            scheduler._preempt_request(request, now, drop_stale_output=True)
            scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        for request in victims:
            if request.request_id not in running:  # a streaming session keeps its blocks between two chunks
                tokens += request.num_computed_tokens
                if request.num_computed_tokens and request.status.name == PAUSED:
                    self._frontiers[request.request_id] = request.num_computed_tokens
                scheduler.kv_cache_manager.free(request)
                request.num_computed_tokens = 0
        return tokens

    @contextmanager
    def at_frontier(self, session: Any) -> Iterator[None]:
        """While vLLM appends the next chunk: it keeps as many of the session's tokens as were computed,
        which is none after a loss."""
        frontier = self._frontiers.pop(session.request_id, 0)
        lost = frontier > 0 and session.num_computed_tokens == 0
        if lost:
            session.num_computed_tokens = frontier
        try:
            yield
        finally:
            if lost:
                session.num_computed_tokens = 0

    def _withdraw(self, block: Any) -> None:
        self._blocks.free_block_queue.remove(block)
        block.ref_cnt = 1
        self.withdrawn.add(block.block_id)
        self.limbo.discard(block.block_id)

    def _restore(self, block: Any) -> None:
        block.ref_cnt = 0
        self._blocks.free_block_queue.append(block)
        self.withdrawn.discard(block.block_id)

    # -- what the engine could use ------------------------------------------------------------

    def arriving(self, request: Any) -> None:
        """A request was read off the socket (input thread): ask for its memory now, so that the
        grant is there before the scheduler is."""
        blocks = self._blocks_for(request)
        self._arriving[request.request_id] = blocks
        self.demand.raise_to(
            self._needed + sum(list(self._arriving.values())), time.monotonic(), urgent=self._settings.urgent
        )

    def arrived(self, request_id: str) -> None:
        """The scheduler has the request (or it will never come)."""
        self._needed += self._arriving.pop(request_id, 0)
        self._counted = (-1, -1, 0.0)  # it may be gone again before the next count: do not skip that one

    def ask(self) -> None:
        """Say what the queue could use; give back what it has not used for a while."""
        scheduler, now = self._scheduler, time.monotonic()
        running, waiting = scheduler.get_request_counts()
        counted = self._counted
        if (running, waiting) == counted[:2] and now - counted[2] < 0.1:
            return
        self._counted = (running, waiting, now)
        self._needed = self._count_needed()
        needed = self._needed + sum(list(self._arriving.values()))
        if needed:
            self.demand.raise_to(needed, now, urgent=self._settings.urgent)
        self._give_back(self.demand.surplus(needed, now))

    @property
    def over_provisioned(self) -> bool:
        """Whether an idle engine must look again: a want that nobody needs any more counts too, or the agent
        would fulfil it some time."""
        return self._needed == 0 and self.demand.has_surplus(0)

    def _count_needed(self) -> int:
        scheduler = self._scheduler
        room = int(scheduler.max_num_running_reqs) - len(scheduler.running)
        total = sum(self._blocks_for(r) for r in scheduler.running)
        for request in scheduler.waiting:
            if room <= 0:
                break
            if request.request_id in self._frontiers:  # a session that waits for its client
                continue
            total += self._blocks_for(request)
            room -= 1
        return total

    def _blocks_for(self, request: Any) -> int:
        tokens = min(int(request.num_prompt_tokens + request.max_tokens), int(self._scheduler.max_model_len))
        return -(-tokens // self._block_size)

    def _give_back(self, slabs: int) -> None:
        if slabs <= 0:
            return
        free = {b.block_id for b in self._blocks.free_block_queue.get_all_free_blocks()}
        for slab in self.pool.returnable(free, slabs):
            gone = self.pool.give_up(slab)
            self._blocks.evict_blocks(set(gone))
            for index in gone:
                self._withdraw(self._blocks.blocks[index])
            self._link.give_back(slab)

    # -- what the agent may know --------------------------------------------------------------

    def publish(self) -> None:
        """Who owns what during the step that starts now."""
        self.ledger.publish(
            [(r.request_id, r.num_computed_tokens, self._block_ids(r)) for r in self._holders()]
        )

    def _holders(self) -> Iterable[Any]:
        """Requests that may hold blocks: the running ones and paused streaming sessions."""
        scheduler = self._scheduler
        yield from scheduler.running
        if scheduler.num_waiting_for_streaming_input or scheduler.kv_holding_waiting:
            running = {r.request_id for r in scheduler.running}
            yield from (r for r in scheduler.requests.values() if r.request_id not in running)

    def _block_ids(self, request: Any) -> list[int]:
        groups = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
        if len(groups) == 1:
            return list(groups[0])
        return [index for group in groups for index in group if index != NULL_BLOCK]
