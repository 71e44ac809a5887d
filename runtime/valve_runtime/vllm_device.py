# SPDX-License-Identifier: Apache-2.0
"""What differs between vLLM on a CPU and on a GPU for an elastic KV cache.

* which methods of vLLM the plugin needs (``HOOKS``), beside those that both have (``vllm.MEMORY_HOOKS``);
* how a block is kept in one piece: on the CPU by a layout that its backend does not name, on a GPU by
  preferring those that every backend in use supports;
* how much memory the engine is told it has: its ``num_gpu_blocks`` follows the arena (``budget``);
* where the KV cache must stay static, and why (``obstacle``).

On a GPU: written against vLLM 0.32's sources, whose methods the tests look up. It has not been run on one.

Threading: EngineCore's main thread while it starts. vLLM is imported when needed, never before. Caller:
vllm.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from valve_runtime.elastic import EngineUnsupported

logger = logging.getLogger("valve.vllm")

Hooks = tuple[tuple[str, str | None, str, tuple[str, ...] | None], ...]

HOOKS: dict[str, Hooks] = {
    "cpu": (
        ("vllm.v1.worker.cpu_worker", "CPUWorker", "determine_available_memory", ()),
        ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend", "supported_kv_cache_layouts", ()),
        ("vllm.v1.kv_cache_layout", "KVCacheLayout", "BLHNC", None),
        ("vllm.platforms.cpu", "CpuPlatform", "check_and_update_config", ("vllm_config",)),
    ),
    "cuda": (
        ("vllm.v1.worker.gpu_worker", "Worker", "determine_available_memory", ()),
        ("vllm.v1.worker.gpu_worker", "Worker", "get_supported_kv_cache_layouts", ()),
        ("vllm.v1.worker.gpu_worker", None, "request_memory", ("init_snapshot", "cache_config")),
        ("vllm.v1.kv_cache_layout", "KVCacheLayout", "is_block_outermost", None),
    ),
}
"""By platform."""

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
Wrap = Callable[[Any, str, Wrapper], None]


def platform() -> str:
    """Where vLLM runs in this process: "cpu", "cuda", or another platform's name ("rocm", whose devices torch
    calls cuda)."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        return "cuda"
    return "cpu" if current_platform.is_cpu() else str(current_platform.device_name)


def outermost_first(names: Sequence[str]) -> list[str]:
    """Layout names with those first that keep a block of all layers in one piece and its heads and tokens
    together (BLHNC, BLNHC); the order is kept otherwise."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    def scattered(name: str) -> bool:
        layout = KVCacheLayout[name]
        return not (layout.is_block_outermost and layout.is_block_compact)

    return sorted(names, key=scattered)


def obstacle(worker: Any) -> str:
    """Why the KV cache of `worker` (with its model loaded) cannot be elastic; "" if it can."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
    from vllm.v1.kv_cache_interface import is_full_attention_spec

    config = worker.vllm_config
    parallel = config.parallel_config
    if parallel.world_size != 1 or parallel.distributed_executor_backend != "uni":
        return (
            f"{parallel.world_size} worker(s) outside the scheduler's process; run with one worker and "
            "--distributed-executor-backend uni for elastic memory"
        )
    if config.kv_transfer_config is not None:
        return "a KV connector is configured"
    if config.model_config.enable_sleep_mode:
        return "sleep mode is enabled, which takes the KV cache away by itself"
    groups = get_kv_cache_groups(config, dict(worker.get_kv_cache_spec()))
    if len(groups) > 1:
        return f"the model has {len(groups)} KV cache groups (hybrid or sliding-window attention)"
    for group in groups:
        if not is_full_attention_spec(group.kv_cache_spec) or not group.kv_cache_spec.has_layer_views:
            return "the model's attention is not full attention"
    return ""


def budget(arena_bytes: int, engine_bytes: int, *, explicit: bool, own_bytes: int) -> int:
    """Bytes that the engine may plan its KV cache with.

    `arena_bytes`: as much as the tenant may ever hold. `engine_bytes`: vLLM's own figure, from what is free
    on the GPU now, which says little where the agent lends memory out; it counts only if the operator named
    it (`explicit`). `own_bytes`: what the engine allocates beside the arena and the tenant's limit counts too
    (weights, activations, graphs); 0 where it does not. Raises EngineUnsupported if nothing is left.
    """
    left = arena_bytes - own_bytes
    if left <= 0:
        raise EngineUnsupported(
            f"weights and activations need {own_bytes >> 20} MiB of the {arena_bytes >> 20} MiB that this "
            "tenant may have, so no KV cache fits: raise valve.io/gpu-memory (`valve run --memory`)"
        )
    return min(left, engine_bytes) if explicit and engine_bytes > 0 else left


def gpu_budget(worker: Any, arena_bytes: int, engine_bytes: int, *, limited: bool) -> int:
    """`budget` with what vLLM's GPU worker knows after ``determine_available_memory``. `limited`: the
    tenant's limit counts weights and activations too (offline)."""
    explicit = worker.cache_config.kv_cache_memory_bytes is not None
    own = 0
    if limited and not explicit:  # with an explicit size vLLM measures nothing
        own = int(worker.total_consumed + worker.peak_activation_memory)
    return budget(arena_bytes, engine_bytes, explicit=explicit, own_bytes=own)


def hook_cpu(wrap: Wrap, keep_worker_in_process: Callable[[Any], None], available: Wrapper) -> None:
    """Wrap what vLLM has for CPUs only."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.cpu_worker import CPUWorker

    def layouts(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(cls: Any) -> Any:
            # CPU kernels address blocks by stride; block-outermost keeps a block in one piece.
            return (KVCacheLayout.BLHNC, *original(cls))

        return wrapped

    def check_config(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(cls: Any, config: Any) -> Any:
            result = original(cls, config)
            keep_worker_in_process(config)
            return result

        return wrapped

    wrap(CPUAttentionBackend, "supported_kv_cache_layouts", layouts)
    wrap(CpuPlatform, "check_and_update_config", check_config)
    wrap(CPUWorker, "determine_available_memory", available)


def hook_cuda(wrap: Wrap, is_lent_out: Callable[[], bool], available: Wrapper) -> None:
    """Wrap what vLLM has for GPUs only. `is_lent_out`: whether an agent lends out this GPU's memory."""
    from vllm.v1.worker import gpu_worker

    def layouts(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(worker: Any) -> list[str]:
            names = original(worker)
            return outermost_first(names) if is_lent_out() else list(names)

        return wrapped

    def request(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(init_snapshot: Any, cache_config: Any, *args: Any, **kwargs: Any) -> int:
            try:
                return int(original(init_snapshot, cache_config, *args, **kwargs))
            except ValueError as lack:
                free = int(init_snapshot.free_memory)
                if not is_lent_out() or any(args) or any(kwargs.values()) or free <= 0:
                    raise
                logger.warning(
                    "valve: vLLM says: %s Valve lends that memory out in slabs, so vLLM starts with the %d "
                    "MiB that are free for weights and activations; its KV cache comes from the arena",
                    lack,
                    free >> 20,
                )
                return free

        return wrapped

    wrap(gpu_worker.Worker, "get_supported_kv_cache_layouts", layouts)
    wrap(gpu_worker, "request_memory", request)
    wrap(gpu_worker.Worker, "determine_available_memory", available)
