# SPDX-License-Identifier: Apache-2.0
"""The adapter for transformers' continuous batching: call ``install()`` before the manager is made.

transformers has no plugin entry points, so the program that serves with it says so in one line. The
duties are those of every engine plugin: busy and idle, the KV cache in the arena, and "these blocks
are gone". The cache of transformers 5.19 is one tensor of *sectors*; with full attention only (the
case supported here) a sector is one KV block of all layers in one piece, and the first two are
never handed out (read trash and write trash).

On a GPU transformers prepares and launches batch N+1 before it reads the outputs of batch N, and a reclaim
does not stop this process, only its channels. A slab is marked lost before it is taken, so whoever reads
outputs first and drains afterwards knows of every loss that they can have met: that is the order here.

One manager at a time has the arena. When it is stopped for good (`generate_batch` makes a new one for every
call) its slabs go back, and the next one begins anew.

Threading: the manager's generation thread, except ``add_request`` (any thread) and what makes and stops a
manager (its owner's thread, while no generation thread runs).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from valve_runtime import _lib
from valve_runtime import geometry as geo
from valve_runtime.activity import Activity
from valve_runtime.elastic import (
    COUNT_LOST_BLOCKS,
    COUNT_RECOMPUTED,
    COUNT_RECOMPUTED_TOKENS,
    COUNT_REQUESTS,
    COUNT_TOKENS,
    DecodeGap,
    Demand,
    DemandSettings,
    ElasticPool,
    EngineUnsupported,
    Ledger,
    RuntimeFault,
    await_pinned,
    drain_events,
)
from valve_runtime.torch_arena import on_arena
from valve_runtime.torch_device import await_agent, current

logger = logging.getLogger("valve.transformers")

TRASH = (0, 1)
VERSIONS = ((5, 19),)
GRANT_WAIT_S = 0.1
"""How long an online request that does not fit waits for memory here, which takes milliseconds: the engine
itself would look again after as long."""
VOID = "valve_lost_blocks"
"""Attribute of a request state whose outputs, of every batch that is in flight, must not be believed."""


def install() -> bool:
    """Make continuous batching in this process a tenant. False if the process is none.

    Raises EngineUnsupported if this transformers is not one whose insides are known.
    """
    if not os.environ.get("VALVE_SOCKET"):
        return False
    valve = _lib.load()
    if valve.role() == _lib.ROLE_NONE:
        return False
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version not in VERSIONS:
        known = ", ".join(f"{a}.{b}" for a, b in VERSIONS)
        raise EngineUnsupported(
            f"transformers {transformers.__version__}: continuous batching changes its insides between minor "
            f"versions, and Valve knows {known}; install one of these"
        )
    online = valve.role() == _lib.ROLE_ONLINE
    settings = DemandSettings(
        urgent=online, idle_return_s=float(os.environ.get("VALVE_KV_IDLE_RETURN_S", "1.0"))
    )
    _hook(Adapter(valve, settings))
    return True


def _hook(adapter: Adapter) -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.continuous_api import (
        ContinuousBatchingManager,
        ContinuousBatchProcessor,
    )

    def replace(owner: Any, name: str, method: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return method(original, self, *args, **kwargs)

        setattr(owner, name, wrapped)

    replace(PagedAttentionCache, "__init__", adapter.make_cache)
    replace(PagedAttentionCache, "reset", adapter.reset_cache)
    replace(ContinuousBatchingManager, "add_request", adapter.add_request)
    replace(ContinuousBatchingManager, "stop", adapter.stop)
    replace(ContinuousBatchingManager, "_create_batch_processor", adapter.create_processor)
    replace(ContinuousBatchingManager, "_run_generation_loop", adapter.run)
    replace(ContinuousBatchProcessor, "__init__", adapter.make_processor)
    replace(ContinuousBatchProcessor, "prepare_next_batch", adapter.prepare_next_batch)
    replace(ContinuousBatchProcessor, "update_batch", adapter.update_batch)


class Adapter:
    """Valve in one process with one continuous-batching manager at a time."""

    def __init__(self, valve: Any, settings: DemandSettings) -> None:
        self._valve = valve
        self._settings = settings
        self._activity = Activity(valve)
        self._gap = DecodeGap()
        self._adding = 0
        self._running: set[Any] = set()
        """Managers whose generation thread runs."""
        self._cache: Any = None
        """The one on the arena."""
        self._owner: Any = None
        """Its manager."""
        self._placed: list[tuple[int, int]] = []
        self._pool: ElasticPool | None = None
        self._tenant: CacheTenant | None = None

    def make_cache(self, original: Callable[..., None], cache: Any, *args: Any, **kwargs: Any) -> None:
        """The cache's one tensor on the arena, as large as the tenant's limit. An online process without an
        arena goes on with a static cache."""
        import torch

        asked = inspect.signature(original).bind(cache, *args, **kwargs).arguments
        config, batching, dtype = asked["config"], asked["continuous_batching_config"], asked["dtype"]
        device, was = torch.device(asked["device"]), batching.num_blocks
        try:
            self._check_alone()
            arena = self._open_arena(device)
            batching.num_blocks = self._blocks(arena, config, batching, dtype, device)
            counts = _arena_counts(arena.nbytes if device.type == "cuda" else 0)
            with counts, on_arena(self._valve, arena) as self._placed:
                original(cache, *args, **kwargs)
            self._cache = cache
            self._pool = self._pool_over(arena, cache)
            await_pinned(self._valve, self._pool, self._settings)
        except (RuntimeFault, _lib.ValveError) as refused:
            if self._cache is cache:
                self._release()
            if not self._settings.urgent:
                raise
            logger.error("valve: no arena (%s): the KV cache stays static and is not shared", refused)
            batching.num_blocks = was
            original(cache, *args, **kwargs)

    def _check_alone(self) -> None:
        if self._cache is not None:
            raise EngineUnsupported(
                "another continuous-batching manager of this process has the arena: stop it first "
                "(manager.stop() without keep_for_next_session)"
            )

    def reset_cache(self, original: Callable[..., None], cache: Any) -> None:
        """As a warm-up ends: every sector is free again, also what was not granted."""
        original(cache)
        if self._tenant is not None and cache is self._cache:
            self._tenant.withdraw_again()

    def _open_arena(self, device: Any) -> Any:
        timeout_ms = 3_000 if self._settings.urgent else 30_000
        await_agent(self._valve, device.type, timeout_ms)
        with current(device):
            return self._valve.arena_open(0, timeout_ms)

    def _blocks(self, arena: Any, config: Any, batching: Any, dtype: Any, device: Any) -> int:
        """How many blocks the cache is planned with: as many as the tenant may ever hold."""
        from transformers.generation.continuous_batching.cache import FullAttentionCacheAllocator
        from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

        block_bytes = config.num_hidden_layers * FullAttentionCacheAllocator.get_bytes_per_page(
            find_num_key_value_heads(config), find_head_dim(config), dtype, batching.page_size
        )
        most = arena.nbytes
        if device.type == "cuda" and not self._settings.urgent:
            import torch

            # An offline tenant's limit counts weights and activations too; the share is transformers' own.
            most = int((most - torch.cuda.memory_reserved(device)) * batching.max_memory_percent)
        blocks: int = most // block_bytes - len(TRASH)
        if blocks < 1:
            raise EngineUnsupported(
                f"what the model takes leaves no room for a KV cache in the {arena.nbytes >> 20} MiB that "
                "this tenant may have: raise valve.io/gpu-memory (`valve run --memory`)"
            )
        return blocks

    def _pool_over(self, arena: Any, cache: Any) -> ElasticPool:
        allocators = list(cache.cache_allocators.values())
        if len(allocators) != 1 or allocators[0].blocks_per_sector != 1:
            raise EngineUnsupported(
                "this model mixes kinds of attention: Valve supports full attention only in transformers' "
                "continuous batching; run it under vLLM"
            )
        region = geo.Region(0, 1, 0, cache.bytes_per_sector, cache.bytes_per_sector)
        blocks = geo.build([region], cache.num_sectors + len(TRASH), arena.slab_bytes, arena.slabs)
        return ElasticPool(blocks, pinned=TRASH)

    def make_processor(
        self, original: Callable[..., None], processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        original(processor, *args, **kwargs)
        if self._pool is not None and processor.cache is self._cache:
            self._tenant = CacheTenant(self._valve, self._pool, self._settings, processor)

    def create_processor(self, original: Callable[..., Any], manager: Any) -> Any:
        try:
            processor = original(manager)
        except BaseException:
            if self._cache is not None and self._owner is None:
                self._release()
            raise
        if processor.cache is self._cache:
            self._owner = manager
        return processor

    def run(self, original: Callable[..., None], manager: Any) -> None:
        """The generation thread: whatever ends it, nothing more happens to its requests."""
        self._running.add(manager)
        try:
            original(manager)
        finally:
            self._running.discard(manager)
            self._settle()
            self._release_if_stopped(manager)

    def stop(self, original: Callable[..., None], manager: Any, *args: Any, **kwargs: Any) -> None:
        original(manager, *args, **kwargs)
        self._release_if_stopped(manager)

    def _release_if_stopped(self, manager: Any) -> None:
        if manager is self._owner and manager.batch_processor is None and manager not in self._running:
            self._release()

    def _release(self) -> None:
        """Give the arena back, for the next manager."""
        pool, self._pool = self._pool, None
        self._cache = self._owner = self._tenant = None
        if self._valve.ledger_begin():
            self._valve.ledger_commit()  # nobody owns anything
        self._valve.want(0, False)
        if pool is not None:
            pool.apply(drain_events(self._valve))
            for slab in sorted(pool.held):
                self._valve.give_back(slab)
        for address, nbytes in self._placed:
            self._valve.unplace(address, nbytes)

    def add_request(self, original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
        self._adding += 1
        entry = f"{self._adding}"
        self._activity.enter(entry)
        self._valve.count(COUNT_REQUESTS, 1)
        accepted = None
        try:
            accepted = original(manager, *args, **kwargs)
            return accepted
        finally:
            self._activity.entered(entry)
            if accepted is None:  # it was dropped
                self._settle()

    def prepare_next_batch(self, original: Callable[..., bool], processor: Any) -> bool:
        tenant = self._tenant_of(processor)
        if tenant is not None:
            tenant.drain()
            tenant.ask()
        prepared = original(processor)
        if tenant is not None:
            if not prepared and self._settings.urgent:
                prepared = self._wait_for_memory(original, processor, tenant)
            tenant.publish()
        if not prepared:
            self._settle()
        return prepared

    def _wait_for_memory(self, original: Callable[..., bool], processor: Any, tenant: CacheTenant) -> bool:
        """Its requests were in the queue when `ask` looked, and nothing fits."""
        until = time.monotonic() + GRANT_WAIT_S
        prepared = False
        while not prepared and tenant.is_short and processor.has_pending_requests():
            if time.monotonic() > until:
                break
            tenant.ask(at_once=True)
            time.sleep(0.001)
            if tenant.drain():
                prepared = original(processor)
        return prepared

    def update_batch(self, original: Callable[..., None], processor: Any) -> None:
        original(processor)
        tenant = self._tenant_of(processor)
        if tenant is not None:
            self._valve.count(COUNT_TOKENS, tenant.accepted)
        self._gap.iteration(time.monotonic())
        self._settle()

    def _tenant_of(self, processor: Any) -> CacheTenant | None:
        tenant = self._tenant
        return tenant if tenant is not None and tenant.cache is processor.cache else None

    def _present(self) -> int:
        """Requests that a generation thread has or will take."""
        count = 0
        for manager in tuple(self._running):
            count += int(manager.input_queue.qsize())
            if manager.batch_processor is not None:
                scheduler = manager.batch_processor.scheduler
                count += len(scheduler.active_requests) + len(scheduler.waiting_requests)
        return count

    def _settle(self) -> None:
        self._activity.settle(self._present, self._gap.longest_ns(time.monotonic()))
        if not self._activity.busy:
            self._gap.rest()


@contextmanager
def _arena_counts(nbytes: int) -> Iterator[None]:
    """Let transformers' check of its plan against the GPU's free memory know of `nbytes` in the arena: what
    the agent lends out is not free, and what the tenant was not granted yet is not used."""
    from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

    original = PagedAttentionMemoryHandler.get_available_memory

    def available(handler: Any) -> int:
        return int(original(handler)) + nbytes

    PagedAttentionMemoryHandler.get_available_memory = available
    try:
        yield
    finally:
        PagedAttentionMemoryHandler.get_available_memory = original


class CacheTenant:
    """Keeps the cache's free sectors true to what is granted. Block and sector numbers are the same."""

    def __init__(self, valve: Any, pool: ElasticPool, settings: DemandSettings, processor: Any) -> None:
        self._valve = valve
        self._pool = pool
        self._scheduler: Any = processor.scheduler
        self.cache: Any = processor.cache
        (self._allocator,) = processor.cache.cache_allocators.values()
        self._settings = settings
        self._demand = Demand(valve, pool, settings)
        self._ledger = Ledger(valve, pool)
        self._withdrawn: set[int] = set()
        self._asked_at = 0.0
        self.accepted = 0
        self._scheduler.safety_margin = 0.0  # a share of the whole cache, most of which may be away
        self._io: Any = processor.inputs_and_outputs
        self._hook_instances()
        self._withdraw(b for b in range(pool.geometry.blocks) if not pool.is_usable(b))

    def _hook_instances(self) -> None:
        schedule, io = self._scheduler.schedule_batch, self._io
        update = io.prepare_batch_update

        def schedule_batch(*args: Any, **kwargs: Any) -> Any:
            batch = schedule(*args, **kwargs)
            if batch[0] is None and self._withdrawn and len(self._scheduler.active_requests) <= 1:
                # Nothing fits and nothing can be put aside: wait for memory instead of failing.
                self._scheduler.block_new_requests = False
                return [], *batch[1:]
            return batch

        def prepare_batch_update() -> Any:
            requests, tokens, logprobs = update()  # waits for the batch: what it met is marked by now
            self.drain()
            return self._believed(requests, tokens, logprobs)

        self._scheduler.schedule_batch = schedule_batch
        io.prepare_batch_update = prepare_batch_update

    def _believed(self, requests: Any, tokens: Any, logprobs: Any) -> Any:
        """A step's outputs without those of requests that lost blocks while it was in flight."""
        kept, kept_tokens, kept_logprobs, at = [], [], [], 0
        for future in requests:
            believed = not hasattr(future.state, VOID)
            if future.has_new_token:
                if believed:
                    kept_tokens.append(tokens[at])
                    if logprobs is not None:
                        kept_logprobs.append(logprobs[at])
                at += 1
            if believed:
                kept.append(future)
        self.accepted = len(kept_tokens)
        return kept, kept_tokens, kept_logprobs if logprobs is not None else None

    @property
    def is_short(self) -> bool:
        """Whether more could be granted."""
        return bool(self._withdrawn)

    def withdraw_again(self) -> None:
        """After the cache has made every sector free."""
        self._withdraw(set(self._withdrawn))

    def drain(self) -> bool:
        """Bring the cache up to date. Before scheduling, and before outputs are believed. True if there is
        more than before."""
        change = self._pool.apply(drain_events(self._valve))
        if change.lost:
            self._lose(change.lost)
            self._withdraw(change.lost - change.gained)
        back = sorted(change.gained & self._withdrawn, reverse=True)
        self._withdrawn.difference_update(back)
        self.cache.pool.free_sectors.extend(back)  # handed out from the end: low numbers first
        return bool(back)

    def _lose(self, lost: set[int]) -> None:
        ledger, scheduler = self._allocator.ledger, self._scheduler
        for block in lost:
            block_hash = ledger.block_to_hash.pop(block, None)
            if block_hash is not None:
                ledger.hash_to_block.pop(block_hash, None)
            if block in ledger.cached_blocks:
                del ledger.cached_blocks[block]
                self.cache.pool.free_blocks(self._allocator.index, [block])
        table = self._allocator.block_table
        owners = [(s, set(table.get(s.request_id, ()))) for s in scheduler.active_requests.values()]
        victims = [state for state, blocks in owners if not lost.isdisjoint(blocks)]
        in_use = {block for _, blocks in owners for block in blocks & lost}
        tokens = 0
        for state in reversed(victims):
            tokens += state.position_offset
            again = state.create_equivalent_initial_request()
            setattr(state, VOID, True)
            self._forget_tokens(state.request_id)
            scheduler.finish_request(state.request_id)
            self._ledger.forget(state.request_id)
            scheduler.waiting_requests[again.request_id] = again
            scheduler.waiting_requests_order.appendleft(again.request_id)
        self._valve.count(COUNT_LOST_BLOCKS, len(in_use))
        self._valve.count(COUNT_RECOMPUTED, len(victims))
        self._valve.count(COUNT_RECOMPUTED_TOKENS, tokens)

    def _forget_tokens(self, request_id: str) -> None:
        """The next batch must not take this request's token over from one in flight (GPU, asynchronous):
        that token is void, and the request starts anew under its old name."""
        for pair in getattr(self._io, "io_pairs", ()):
            positions = pair.host_io.req_id_to_new_token_position
            if request_id in positions:  # what counts is its place in the order, so that is kept
                pair.host_io.req_id_to_new_token_position = {
                    (f"{VOID} {name}" if name == request_id else name): at for name, at in positions.items()
                }

    def _withdraw(self, blocks: Any) -> None:
        """Take free blocks out of circulation."""
        self.cache.pool.try_to_free_sectors()
        away = {block for block in blocks if block not in TRASH}
        free = self.cache.pool.free_sectors
        missing = away - set(free)
        if missing:
            raise EngineUnsupported(
                f"blocks {sorted(missing)[:8]} are gone but still referenced: parallel sampling "
                "(num_return_sequences) is not supported under Valve; send the requests one by one"
            )
        free[:] = [sector for sector in free if sector not in away]
        self._withdrawn |= away

    def ask(self, *, at_once: bool = False) -> None:
        """Say what the queue could use; give back what it has not used for a while."""
        now = time.monotonic()
        if now - self._asked_at < 0.05 and not at_once:
            return
        self._asked_at = now
        scheduler, size = self._scheduler, self._allocator.tokens_per_page
        requests = [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]
        needed = sum(
            -(-(len(r.initial_tokens) + (r.max_new_tokens or 0)) // size)
            for r in requests[: scheduler.max_requests_per_batch]
        )
        if needed:
            self._demand.raise_to(needed, now, urgent=self._settings.urgent)
        surplus = self._demand.surplus(needed, now)
        if surplus:
            self.cache.pool.try_to_free_sectors()
            for slab in self._pool.returnable(self.cache.pool.free_sectors, surplus):
                self._withdraw(self._pool.give_up(slab))
                self._valve.give_back(slab)

    def publish(self) -> None:
        table = self._allocator.block_table
        self._ledger.publish(
            [
                (state.request_id, state.position_offset, table.get(state.request_id, ()))
                for state in self._scheduler.active_requests.values()
            ]
        )
