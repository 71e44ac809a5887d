# SPDX-License-Identifier: Apache-2.0
"""vLLM's real schedulers and step functions on a pretended GPU, from which memory is taken at any moment.

The engine's process runs on while the device computes, is interrupted and goes on; with asynchronous
scheduling two steps are in flight. That needs a GPU to happen, so here the device is a few lines: KV blocks
are lists of numbers, and the model has two layers: the first keeps tokens, the second a digest of all that
the first keeps up to there, and what is sampled is a digest of the second. A block that was lost reads as
garbage and keeps nothing, a block that was granted reads as zeros. So one number that was computed from
garbage and is believed, or shared by its prefix hash, changes every token that follows.

Run by the engines' Python with {"model": FOLDER, "cases": {NAME: {"seeds": N, "asynchronous": BOOL, "prefix":
BOOL, "tell": BOOL, "departed": BOOL, "sessions": BOOL, "frontier": BOOL, "runner": 1 or 2}}}; prints {NAME:
{"wrong": requests whose tokens differ, "requests": N, "reclaims_in_use": N, "recomputed": N}}. With
`sessions` there are streaming sessions too. With `tell` false the engine hears of no loss; with `departed`
false the plugin does not care about requests that left while they were in flight, with `frontier` false it
does not care how far a paused session had come. All three must show. The caller is test_scheduling.py.
"""

from __future__ import annotations

import json
import queue
import random
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runtime"))

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from valve_runtime import vllm
from valve_runtime.elastic import GRANTED, LOST, DemandSettings, ElasticPool
from valve_runtime.geometry import Region, build
from valve_runtime.vllm_kv import KvTenant

BLOCK, BLOCKS, SLABS = 4, 41, 20
"""Tokens per block; blocks; slabs of two blocks and a bit, so that some blocks need two."""
VOCABULARY = 5000
GARBAGE = 4999


def digest(numbers: list[int]) -> int:
    value = 17
    for number in numbers:
        value = (value * 31 + number + 1) % 1_000_003
    return value % (VOCABULARY - 1)


def sample(tokens: list[int]) -> int:
    """The model: what follows these tokens."""
    return digest([digest(tokens[: n + 1]) for n in range(len(tokens))])


def empty(number: int) -> list[list[int]]:
    """A block: layers, positions."""
    return [[number] * BLOCK for _ in range(2)]


class Device:
    """The memory, the agent that moves it, and libvalve as the plugin sees it."""

    def __init__(self, dice: random.Random, tell: bool) -> None:
        self.dice, self.tell = dice, tell
        self.told: set[int] = set()
        self.lost: set[int] = set()
        """Told, and gone since; perhaps granted anew."""
        self.blocks = [empty(0) for _ in range(BLOCKS)]
        self.geometry = build([Region(0, 1, 0, 10, 10)], BLOCKS, 21, SLABS)
        self.granted: set[int] = set()
        self.in_use: Callable[[], set[int]] = set
        self.reclaims_in_use = 0
        self.wanted = 0
        self.counted = [0] * 5

    # -- what happens to it: at any moment between two instructions of a kernel or of the engine

    def disturb(self, chance: float) -> None:
        if self.dice.random() < chance:
            self.take()
        if self.dice.random() < 2 * chance:
            self.give()

    def take(self) -> None:
        candidates = sorted(self.granted - {0})
        for slab in self.dice.sample(candidates, min(len(candidates), self.dice.randint(1, 4))):
            if slab in self.told and self.tell:
                self.lost.add(slab)  # marked first, taken then
            self.granted.discard(slab)
            self.reclaims_in_use += not self.in_use().isdisjoint(self.geometry.blocks_of[slab])
            for block in self.geometry.blocks_of[slab]:
                self.blocks[block] = empty(GARBAGE)

    def give(self) -> None:
        away = sorted(set(range(self.geometry.slabs_used)) - self.granted)
        for slab in self.dice.sample(away, min(len(away), self.dice.randint(1, 6))):
            self.granted.add(slab)
            for block in self.geometry.blocks_of[slab]:
                if self.is_there(block):
                    self.blocks[block] = empty(0)

    def is_there(self, block: int) -> bool:
        return self.granted.issuperset(self.geometry.slabs_of[block])

    def write(self, layer: int, table: list[int], position: int, number: int) -> None:
        block = table[position // BLOCK]
        self.blocks[block][layer][position % BLOCK] = number if self.is_there(block) else GARBAGE

    def read(self, layer: int, table: list[int], past: int) -> list[int]:
        return [self.blocks[table[at // BLOCK]][layer][at % BLOCK] for at in range(past)]

    # -- libvalve

    def poll(self) -> tuple[int, int] | None:
        if self.lost:  # losses come first; of a slab that came and went unseen nobody hears (slab.h)
            slab = self.lost.pop()
            self.told.discard(slab)
            return LOST, slab
        for slab in sorted(self.granted - self.told):
            self.told.add(slab)
            return GRANTED, slab
        return None

    def want(self, total_slabs: int, urgent: bool) -> None:
        self.wanted = total_slabs

    def give_back(self, slab: int) -> bool:
        self.granted.discard(slab)
        self.told.discard(slab)
        return True

    def count(self, counter: int, n: int) -> None:
        self.counted[counter] += n

    def ledger_begin(self) -> bool:
        return False

    def busy(self) -> None: ...
    def idle(self, decode_gap_ns: int) -> None: ...


class Worker:
    """The executor: keeps what a model runner keeps between steps; computes when waited for, or earlier."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, list[int]] = {}
        self.stream: deque[Callable[[], None]] = deque()
        self.last: Future[Any] | None = None

    def execute_model(self, output: Any, non_block: bool = False) -> Future[Any]:
        steps = []
        for new in output.scheduled_new_reqs:
            # Runner V2 is told of a request that comes back as of a new one.
            self.tokens[new.req_id] = list(new.prefill_token_ids or new.prompt_token_ids)
            self.tables[new.req_id] = list(new.block_ids[0])
            steps.append((new.req_id, new.num_computed_tokens))
        cached = output.scheduled_cached_reqs
        for n, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[n]
            if name in cached.resumed_req_ids:
                self.tokens[name] = list(cached.all_token_ids[name])
                self.tables[name] = []
            self.tables[name] += list(blocks[0]) if blocks else []
            steps.append((name, cached.num_computed_tokens[n]))
        work = [
            (name, start, output.num_scheduled_tokens[name], self.tokens[name], list(self.tables[name]))
            for name, start in steps
        ]
        sampled: dict[str, list[int]] = {}
        self.stream.append(lambda: self._kernel(work, sampled))
        future: Future[Any] = Waited(self, work, sampled)
        while self.stream and self.device.dice.random() < 0.3:  # the device is ahead of the process
            self._advance()
        self.last = future
        if not output.total_num_scheduled_tokens:
            return future
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def sample_tokens(self, grammar: Any, non_block: bool = False) -> Any:
        assert self.last is not None
        return self.last if non_block else self.last.result()

    def _advance(self) -> None:
        self.stream.popleft()()

    def _kernel(self, work: list[Any], sampled: dict[str, list[int]]) -> None:
        device = self.device
        for layer in range(2):  # all write before any goes on: blocks may be shared
            for _, start, count, tokens, table in work:
                device.disturb(0.02)
                for position in range(start, start + count):
                    below = digest(device.read(0, table, position + 1)) if layer else tokens[position]
                    device.write(layer, table, position, below)
        for name, start, count, tokens, table in work:
            device.disturb(0.02)
            sampled[name] = []
            if start + count == len(tokens):  # not a piece of a prompt
                # On the device: the next step takes it from there.
                tokens.append(digest(device.read(1, table, start + count)))
                sampled[name] = [tokens[-1]]


class Waited(Future):  # type: ignore[type-arg]
    """The outputs of a step: whoever asks waits until the device is there."""

    def __init__(self, worker: Worker, work: list[Any], sampled: dict[str, list[int]]) -> None:
        super().__init__()
        self._worker, self._work, self._sampled = worker, work, sampled

    def result(self, timeout: float | None = None) -> Any:
        names = [item[0] for item in self._work]
        while any(name not in self._sampled for name in names):
            self._worker._advance()
        self._worker.device.disturb(0.1)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: n for n, name in enumerate(names)},
            sampled_token_ids=[self._sampled[name] for name in names],
        )


class Core(EngineCore):
    """EngineCore without an engine: what `step` and `step_with_batch_queue` touch."""

    def __init__(self, scheduler: Any, worker: Worker, depth: int, config: VllmConfig) -> None:
        self.scheduler, self.vllm_config = scheduler, config
        self.model_executor: Any = worker
        self.batch_queue_size = depth
        self.batch_queue = deque(maxlen=depth) if depth > 1 else None
        self.is_mm_encoder_only = self.is_pooling_model = self.check_for_draft_tokens = False
        self.log_stats = False
        self.aborts_queue = queue.Queue()
        self._weight_version = "default"

    def advance(self) -> None:
        self.step() if self.batch_queue is None else self.step_with_batch_queue()


class Session:
    """A streaming session: its client sends a chunk some time after the one before was answered."""

    def __init__(self, name: str, dice: random.Random, hasher: Any) -> None:
        self._name, self._hasher = name, hasher
        self.chunks: list[tuple[list[int], int]] = []
        """To come (or not yet answered): tokens, and how many to answer with."""
        self.expected: list[int] = []
        self.tokens: list[int] = []
        for _ in range(3):
            chunk = [dice.randrange(VOCABULARY - 1) for _ in range(dice.randint(2, 9))]
            self.chunks.append((chunk, dice.randint(2, 8)))
            self.expected = self.expected[:-1] + chunk  # vLLM drops the token that was not computed on
            for _ in range(self.chunks[-1][1]):
                self.expected.append(sample(self.expected))
        self.request = self._next(resumable=True)

    def _next(self, *, resumable: bool) -> Request:
        tokens, answer = self.chunks[0] if self.chunks else ([0], 1)
        parameters = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        return Request(
            self._name, list(tokens), parameters, None, block_hasher=self._hasher, resumable=resumable
        )

    def proceed(self, scheduler: Any) -> None:
        if not self.chunks or self.request.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
            return
        self.chunks.pop(0)
        self.tokens = list(self.request.all_token_ids)
        scheduler.add_request(self._next(resumable=bool(self.chunks)))


def configure(model: str, asynchronous: bool, prefix: bool) -> VllmConfig:
    config = EngineArgs(
        model=model, dtype="float32", max_model_len=64, max_num_seqs=8, block_size=32, enforce_eager=True,
        max_num_batched_tokens=32, enable_prefix_caching=prefix,
    ).create_engine_config()  # fmt: skip
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = BLOCKS
    config.scheduler_config.async_scheduling = asynchronous
    return config


def run(config: VllmConfig, plugin: Any, seed: int, case: dict[str, Any]) -> dict[str, int]:
    """One engine's life: requests of random lengths, memory that comes and goes; every token is checked."""
    dice, asynchronous = random.Random(seed), case["asynchronous"]
    device = Device(dice, case["tell"])
    pool = ElasticPool(device.geometry, pinned=(0,))
    device.granted = set(range(device.geometry.slabs_used))
    device.told = set(device.granted)
    pool.apply([(GRANTED, slab) for slab in sorted(device.granted)])
    plugin.valve = device
    settings = DemandSettings(idle_return_s=1e9)
    plugin.backing = SimpleNamespace(link=device, pool=pool, settings=settings, runner=None)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    make = AsyncScheduler if asynchronous else Scheduler
    scheduler: Any = make(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK, hash_block_size=BLOCK, log_stats=False,
    )  # fmt: skip
    scheduler.use_v2_model_runner = case["runner"] == 2  # vLLM itself wants Triton for it
    assert plugin.tenant is not None
    assert plugin.tenant.schedules_for(scheduler)
    device.in_use = lambda: {
        block
        for r in scheduler.running
        for block in scheduler.kv_cache_manager.get_block_ids(r.request_id)[0]
    }
    core = Core(scheduler, Worker(device), 2 if asynchronous else 1, config)
    prefix = config.cache_config.enable_prefix_caching
    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256")) if prefix else None
    shared = [dice.randrange(VOCABULARY - 1) for _ in range(13)]
    requests = []
    for n in range(10):
        own = [dice.randrange(VOCABULARY - 1) for _ in range(dice.randint(1, 12))]
        parameters = SamplingParams(temperature=0, max_tokens=dice.randint(1, 16), ignore_eos=True)
        requests.append(
            Request(f"{n}", shared + own if n % 2 else own, parameters, None, block_hasher=hasher)
        )  # fmt: skip
    sessions = [Session(f"s{n}", dice, hasher) for n in range(3)] if case["sessions"] else []
    waiting = [session.request for session in sessions] + requests
    for turn in range(4000):
        if waiting and (turn % 3 == 0):
            scheduler.add_request(waiting.pop(0))
        device.disturb(0.05)
        for session in sessions:
            if dice.random() < 0.1:
                session.proceed(scheduler)
        if (
            not waiting
            and not any(s.chunks for s in sessions)
            and not scheduler.has_requests()
            and not core.batch_queue
        ):
            break
        core.advance()
        if turn > 3000:
            device.give()  # let it come to an end
    else:
        raise AssertionError(f"seed {seed}: {scheduler.get_request_counts()} requests never ended")
    wrong = 0
    for request in requests:
        tokens = list(request.prompt_token_ids or [])
        for _ in range(request.max_tokens):
            tokens.append(sample(tokens))
        wrong += list(request.all_token_ids) != tokens
    wrong += sum(session.tokens != session.expected for session in sessions)
    recomputed = device.counted[2]
    return {
        "wrong": wrong,
        "requests": len(requests) + len(sessions),
        "reclaims_in_use": device.reclaims_in_use,
        "recomputed": recomputed,
    }


def main() -> None:
    asked = json.loads(sys.argv[1])
    init_none_hash(get_hash_fn_by_name("sha256"))
    plugin = vllm.Plugin(Device(random.Random(0), True), online=False, settings=DemandSettings())
    plugin.device = "cpu"
    plugin._hook_engine_core()
    plugin._hook_memory()
    departing, at_frontier = KvTenant.departing, KvTenant.at_frontier
    answers = {}
    for name, case in asked["cases"].items():
        config = configure(asked["model"], case["asynchronous"], case["prefix"])
        KvTenant.departing = departing if case["departed"] else _nothing  # type: ignore[method-assign]
        KvTenant.at_frontier = at_frontier if case["frontier"] else nullcontext  # type: ignore[method-assign, assignment]
        total: dict[str, int] = {}
        for seed in range(case["seeds"]):
            for key, value in run(config, plugin, seed, case).items():
                total[key] = total.get(key, 0) + value
        answers[name] = total
    print(json.dumps(answers))


def _nothing(tenant: KvTenant, request: Any) -> None: ...


if __name__ == "__main__":
    main()
