# SPDX-License-Identifier: Apache-2.0
"""Checks of the plugins' GPU path against the real torch, vLLM and transformers, as far as one gets without a
GPU.

Run by the engines' Python; prints one JSON object {check: "" or what failed}. What is not here cannot be had
without a GPU: a CUDA tensor, a launch, a stream. The caller is test_engines_on_gpu.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import mmap
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runtime"))

import torch

from valve_runtime import torch_arena, vllm, vllm_device
from valve_runtime._lib import Arena
from valve_runtime.elastic import DemandSettings, EngineUnsupported
from valve_runtime.vllm_kv import Backing

SLAB = 1 << 16
SLABS = 32


class Host:
    """Host memory in the place of an arena, filled with 7; and who says where pieces of it lie."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self.memory = mmap.mmap(-1, SLAB * SLABS)
        self.memory.write(b"\7" * (SLAB * SLABS))
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.arena = Arena(base, SLAB, SLABS)
        self.next = base
        self.placed: list[tuple[int, int]] = []

    def device(self) -> str:
        return self._device

    def place(self, nbytes: int) -> int:
        at, self.next = self.next, self.next + -(-nbytes // SLAB) * SLAB
        self.placed.append((at, nbytes))
        return at

    def unplace(self, address: int, nbytes: int) -> None:
        self.placed.remove((address, nbytes))

    def slabs_written(self, value: int) -> list[int]:
        content = self.memory[:]
        return [s for s in range(SLABS) if bytes([value]) in content[s * SLAB : (s + 1) * SLAB]]


@contextlib.contextmanager
def refused(words: str) -> Iterator[None]:
    said = ""
    try:
        yield
    except EngineUnsupported as error:
        said = str(error)
    assert words in said, said or "nobody refused"


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


# ---- torch ----


def a_tensor_is_the_arena_and_nothing_is_written() -> None:
    host, size = Host(), 5 * SLAB + 4096
    with torch_arena.on_arena(host, host.arena, size):
        small = torch.zeros(16, dtype=torch.int8)
        made = torch.zeros(size, dtype=torch.int8, device="cpu")
    assert not small.any()
    assert (made.data_ptr(), made.numel(), made.untyped_storage().nbytes()) == (host.arena.base, size, size)
    assert bool((made == 7).all()), "the arena was written"
    made.view(torch.float32)[1] = 1.0
    assert host.memory[4:8] == b"\0\0\x80\x3f"
    assert host.placed == [(host.arena.base, size)]


def what_goes_wrong_leaves_nothing_placed() -> None:
    host = Host()
    with refused("does not fit the arena"), torch_arena.on_arena(host, host.arena, SLABS * SLAB + 1):
        torch.zeros(SLABS * SLAB + 1, dtype=torch.int8)
    with refused("made 2 backing buffers"), torch_arena.on_arena(host, host.arena, 4 * SLAB):
        torch.zeros(4 * SLAB, dtype=torch.int8)
        assert not torch.zeros(4 * SLAB, dtype=torch.int8).any(), "the second is the engine's own"
    with refused("made 0 backing buffers"), torch_arena.on_arena(host, host.arena, 4 * SLAB):
        torch.zeros(4 * SLAB, dtype=torch.float32)
    assert host.placed == []
    host.next += SLAB
    with refused("another part of this process"), torch_arena.on_arena(host, host.arena, SLAB):
        torch.zeros(SLAB, dtype=torch.uint8)
    assert host.placed == []


def an_engine_on_another_device_than_the_agent_is_refused() -> None:
    for agent, engine in (("cpu", "cuda"), ("cpu", "cuda:1"), ("nvidia", "cpu")):
        host = Host(agent)
        words = f"the engine computes on {engine[:4].rstrip(':')}"
        with refused(words), torch_arena.on_arena(host, host.arena, SLAB):
            torch.zeros(SLAB, dtype=torch.int8, device=engine)
        assert host.placed == []


def torch_is_asked_for_device_memory() -> None:
    """What is handed over on a GPU: a device address. From here on torch needs one, so it is stood in for."""
    host, asked = Host("nvidia"), []

    def from_dlpack(capsule: Any) -> Any:
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = torch_arena._Managed.from_address(pointer(capsule, b"dltensor")).tensor
        kind = (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
        asked.append((tensor.data, tensor.device.type, tensor.device.id, tensor.shape[0], kind))
        return SimpleNamespace(
            data_ptr=lambda: tensor.data,
            numel=lambda: tensor.shape[0],
            device=SimpleNamespace(type="cuda"),
        )

    with replaced(torch, "from_dlpack", from_dlpack), replaced(torch.cuda, "current_device", lambda: 3):
        for name, dtype in (("cuda:1", torch.int8), ("cuda", torch.uint8)):
            host.next = host.arena.base
            with torch_arena.on_arena(host, host.arena, 2 * SLAB):
                torch.zeros(2 * SLAB, dtype=dtype, device=name)
    base, kdl_cuda = host.arena.base, 2
    assert asked == [(base, kdl_cuda, 1, 2 * SLAB, (0, 8, 1)), (base, kdl_cuda, 3, 2 * SLAB, (1, 8, 1))]


def the_real_torch_takes_it_for_device_memory() -> None:
    """Without a GPU it can only say that there is none, which it would not over host memory."""
    if torch.cuda.is_available():
        return
    said = ""
    try:
        torch_arena.tensor_at(Host().arena.base, SLAB, torch.int8, torch.device("cuda", 0))
    except (RuntimeError, AssertionError) as error:
        said = str(error)
    assert "NVIDIA driver" in said, said or "a CUDA tensor without a GPU"


def the_real_torch_takes_our_allocator() -> None:
    """A pool of it needs a GPU; that libvalve has what it calls does not."""
    from valve_runtime import torch_pool

    (library,) = Path(__file__).resolve().parents[2].glob("build/runtime/lib/libvalve-*.so")
    with replaced(torch_pool, "library", lambda: str(library)):
        said = ""
        try:
            torch_pool.pool()
        except RuntimeError as error:
            said = str(error)
    assert "NVIDIA driver" in said or torch.cuda.is_available(), said
    assert "no_split" in inspect.signature(torch.cuda.MemPool).parameters


# ---- vLLM ----


def vllm_has_what_the_plugin_wraps() -> None:
    for device, hooks in vllm_device.HOOKS.items():
        missing = vllm.missing_hooks(vllm.MEMORY_HOOKS + hooks)
        assert missing == [], f"{device}: {missing}"


def vllm_measures_what_the_budget_reads() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    source = inspect.getsource(Worker.determine_available_memory)
    for name in ("self.total_consumed = ", "self.peak_activation_memory = ", "self.requested_memory"):
        assert name in source, name
    assert "request_memory(" in inspect.getsource(Worker.init_device)


def layouts_in_one_piece_come_first() -> None:
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

    usual = [layout.name for layout in get_supported_kv_cache_layouts([])]
    assert usual[0] == "LBNHC", "vLLM's own order has changed"
    assert vllm_device.outermost_first(usual)[:3] == ["BLNHC", "BLHNC", "LBNHC"]
    assert sorted(vllm_device.outermost_first(usual)) == sorted(usual)
    assert vllm_device.outermost_first(["LBNHC"]) == ["LBNHC"], "never one that a backend does not support"


def _config(layout: Any, blocks: int, layers: int, padded: int | None = None) -> Any:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, page_size_padded=padded
    )
    names = [f"layers.{n}" for n in range(layers)]
    per_block = layers * spec.page_size_bytes
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout, num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
    )  # fmt: skip
    everything: Any = SimpleNamespace(
        cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None)
    )
    return get_kv_cache_config_from_groups(everything, [KVCacheGroupSpec(names, spec)], blocks * per_block)


def the_geometry_is_where_vllm_writes() -> None:
    """vLLM's own config and views of every layout: each block's bytes lie in the slabs that we say."""
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    blocks, layers = 37, 5
    for layout in KVCacheLayout:
        for kernel_sizes in ([16], [8]):
            if kernel_sizes == [8] and (layout.is_block_outermost or not layout.is_block_compact):
                continue  # vLLM does not split these
            host = Host()
            backing = Backing(host, host.arena, DemandSettings())
            config = _config(layout, blocks, layers)
            with torch_arena.on_arena(host, host.arena, config.kv_cache_tensors[0].size):
                views = allocate_kv_cache(config, torch.device("cpu"), layout, kernel_sizes)
            geometry = backing._pool(config, views).geometry
            assert geometry.scattered is not layout.is_block_outermost, layout
            ratio = 16 // kernel_sizes[0]
            for block in (0, 1, blocks // 2, blocks - 1):
                for view in views.values():
                    view[block * ratio : (block + 1) * ratio].fill_(1.0)  # 0x3f80 in bfloat16
                written = host.slabs_written(0x3F)
                claimed = list(geometry.slabs_of[block])
                assert written == claimed, (layout, kernel_sizes, block, written, claimed)
                host.memory[:] = b"\7" * (SLAB * SLABS)


def what_cannot_be_elastic_is_said() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    common: Any = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    full, sliding = FullAttentionSpec(**common), SlidingWindowSpec(**common, sliding_window=64)

    def said(specs: dict[str, Any] | None = None, **changes: Any) -> str:
        config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(
                world_size=changes.get("world_size", 1),
                distributed_executor_backend=changes.get("backend", "uni"),
            ),
            kv_transfer_config=changes.get("connector"),
            model_config=SimpleNamespace(enable_sleep_mode=changes.get("sleep", False)),
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
            attention_config=SimpleNamespace(hisparse_config=None),
        )
        worker = SimpleNamespace(
            vllm_config=config, get_kv_cache_spec=lambda: specs or {"a": full, "b": full}
        )
        return vllm_device.obstacle(worker)

    assert said() == ""
    assert "outside the scheduler's process" in said(world_size=2)
    assert "outside the scheduler's process" in said(backend="mp")
    assert "KV connector" in said(connector=object())
    assert "sleep mode" in said(sleep=True)
    assert "not full attention" in said({"a": sliding, "b": sliding})


def a_gpu_whose_memory_is_lent_out_does_not_stop_vllm() -> None:
    """`hook_cuda` on the real classes: `request_memory` lets vLLM start with what is free."""
    from vllm.v1.worker import gpu_worker

    lent, worker, check = True, gpu_worker.Worker, gpu_worker.request_memory
    measure, layouts = worker.determine_available_memory, worker.get_supported_kv_cache_layouts
    gib = 1 << 30
    snapshot = SimpleNamespace(free_memory=30 * gib, total_memory=80 * gib, device_="cuda:0")
    want = SimpleNamespace(gpu_memory_utilization=0.9)
    modest = SimpleNamespace(gpu_memory_utilization=0.25)
    try:
        vllm_device.hook_cuda(vllm.wrap, lambda: lent, lambda original: lambda worker: original(worker) + 1)
        assert gpu_worker.request_memory(snapshot, modest) == 20 * gib
        assert gpu_worker.request_memory(snapshot, want) == 30 * gib
        lent = False
        for asked in ((snapshot, want), (snapshot, want, 1)):
            try:
                gpu_worker.request_memory(*asked)
            except ValueError:
                pass
            else:
                raise AssertionError("vLLM no longer refuses a GPU that is too full")
        assert worker.determine_available_memory is not measure
        assert worker.determine_available_memory.__name__ == "determine_available_memory"
    finally:
        gpu_worker.request_memory = check
        worker.determine_available_memory = measure
        del worker.get_supported_kv_cache_layouts
    assert worker.get_supported_kv_cache_layouts is layouts


def outputs_are_read_before_they_are_believed() -> None:
    """vLLM waits for a step before it calls update_from_output, where the plugin drains first: both ways."""
    from vllm.v1.engine.core import EngineCore

    for step in (EngineCore.step, EngineCore.step_with_batch_queue):
        source = inspect.getsource(step)
        assert source.index("future.result()") < source.index("update_from_output("), step


# ---- transformers ----


def a_lost_request_takes_no_token_over() -> None:
    """The real look-up of tokens in flight, asynchronous batching: the others keep their places."""
    from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs

    from valve_runtime.transformers_cb import CacheTenant

    def pair(**positions: int) -> Any:
        return SimpleNamespace(host_io=SimpleNamespace(req_id_to_new_token_position=dict(positions)))

    io: Any = SimpleNamespace(
        io_pairs=[pair(c=1, lost=3, a=5), pair(a=0, lost=2, b=4, c=6)], current_pair=0, max_batch_tokens=8
    )
    before = ContinuousBatchingAsyncIOs.infer_carry_over_ids(io).tolist()
    assert before == [-1, 3, -1, 1, -1, 0, -1, -1], before
    tenant: Any = SimpleNamespace(_io=io)
    CacheTenant._forget_tokens(tenant, "lost")
    io.io_pairs[0] = pair(c=1, lost=3, a=5)  # it starts anew in the batch that is made now
    after = ContinuousBatchingAsyncIOs.infer_carry_over_ids(io).tolist()
    assert after == [-1, 3, -1, -1, -1, 0, -1, -1], after


def transformers_has_what_the_adapter_wraps() -> None:
    from transformers.generation.continuous_batching import cache, input_outputs, requests
    from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

    from valve_runtime import transformers_cb

    handler: Any = SimpleNamespace()
    with replaced(PagedAttentionMemoryHandler, "get_available_memory", lambda self: 5):
        with transformers_cb._arena_counts(37):
            assert PagedAttentionMemoryHandler.get_available_memory(handler) == 42
        assert PagedAttentionMemoryHandler.get_available_memory(handler) == 5
    assert "self.get_available_memory()" in inspect.getsource(cache.PagedAttentionMemoryHandler.__init__)
    assert "synchronize()" in inspect.getsource(input_outputs.ContinuousBatchingAsyncIOs.prepare_batch_update)
    assert "device" in inspect.signature(cache.PagedAttentionCache.__init__).parameters
    state = requests.RequestState(request_id="r", initial_tokens=[1])
    setattr(state, transformers_cb.VOID, True)
    assert not hasattr(state.create_equivalent_initial_request(), transformers_cb.VOID)


CHECKS: tuple[Callable[[], None], ...] = (
    a_tensor_is_the_arena_and_nothing_is_written,
    what_goes_wrong_leaves_nothing_placed,
    an_engine_on_another_device_than_the_agent_is_refused,
    torch_is_asked_for_device_memory,
    the_real_torch_takes_it_for_device_memory,
    the_real_torch_takes_our_allocator,
    vllm_has_what_the_plugin_wraps,
    vllm_measures_what_the_budget_reads,
    layouts_in_one_piece_come_first,
    the_geometry_is_where_vllm_writes,
    what_cannot_be_elastic_is_said,
    a_gpu_whose_memory_is_lent_out_does_not_stop_vllm,
    outputs_are_read_before_they_are_believed,
    a_lost_request_takes_no_token_over,
    transformers_has_what_the_adapter_wraps,
)


def main() -> None:
    answers = {}
    for check in CHECKS:
        try:
            check()
            answers[check.__name__] = ""
        except Exception:  # noqa: BLE001  (it is the answer)
            answers[check.__name__] = traceback.format_exc()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
