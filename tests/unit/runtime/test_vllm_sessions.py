# SPDX-License-Identifier: Apache-2.0
"""A streaming session that waits for its client is no request; its next chunk is one before anybody works
on it. Stand-ins of a few lines take vLLM's place; their names are vLLM's."""

from __future__ import annotations

import asyncio
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from valve_runtime import vllm
from valve_runtime.elastic import DemandSettings


class Library:
    def __init__(self) -> None:
        self.is_busy = False

    def busy(self) -> None:
        self.is_busy = True

    def idle(self, decode_gap_ns: int) -> None:
        self.is_busy = False

    def count(self, counter: int, n: int) -> None: ...


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def plugin(library: Library) -> vllm.Plugin:
    return vllm.Plugin(library, online=True, settings=DemandSettings())


def stand_in(patch: pytest.MonkeyPatch, module: str, **names: Any) -> None:
    parts = module.split(".")
    for n in range(1, len(parts)):
        patch.setitem(sys.modules, ".".join(parts[:n]), SimpleNamespace())  # type: ignore[misc]
    patch.setitem(sys.modules, module, SimpleNamespace(**names))  # type: ignore[misc]


# -- API server -------------------------------------------------------------------------------


def server(patch: pytest.MonkeyPatch, library: Library, *, chunks: bool = True) -> tuple[Any, list[bool]]:
    """An API server; whether it was busy whenever a request went on to EngineCore."""
    sent: list[bool] = []

    class OutputProcessor:
        def __init__(self) -> None:
            self.request_states: dict[str, Any] = {}

        def get_num_unfinished_requests(self) -> int:
            return len(self.request_states)

        def process_outputs(self) -> None: ...
        def abort_requests(self, request_ids: list[str]) -> None: ...
        def propagate_error(self) -> None: ...

    class AsyncLLM:
        def __init__(self) -> None:
            self.output_processor = OutputProcessor()

        async def add_request(self, request_id: str) -> None: ...

    async def add_chunk(llm: Any, request: Any) -> None:
        sent.append(library.is_busy)
        states = llm.output_processor.request_states
        states[request.request_id] = SimpleNamespace(streaming_input=request.resumable, input_chunk_queue=[])

    if chunks:
        AsyncLLM._add_request = add_chunk  # type: ignore[attr-defined]
    stand_in(patch, "vllm.v1.engine.output_processor", OutputProcessor=OutputProcessor)
    stand_in(patch, "vllm.v1.engine.async_llm", AsyncLLM=AsyncLLM)
    return AsyncLLM(), sent


def test_the_api_server_is_idle_between_two_chunks(
    monkeypatch: pytest.MonkeyPatch, plugin: vllm.Plugin, library: Library
) -> None:
    llm, sent = server(monkeypatch, library)
    plugin._hook_api_server()
    processor = llm.output_processor
    asyncio.run(llm.add_request("s"))
    for _ in range(2):
        asyncio.run(llm._add_request(SimpleNamespace(request_id="s-1", resumable=True)))
        assert library.is_busy
        processor.request_states["s-1"].input_chunk_queue = None  # the chunk was answered
        processor.process_outputs()
        assert not library.is_busy
    assert sent == [True, True]
    asyncio.run(llm._add_request(SimpleNamespace(request_id="r", resumable=False)))
    processor.process_outputs()
    assert library.is_busy, "another request is there"
    del processor.request_states["r"]
    processor.process_outputs()
    assert not library.is_busy


def test_a_session_counts_where_its_chunks_are_not_seen(
    monkeypatch: pytest.MonkeyPatch, plugin: vllm.Plugin, library: Library
) -> None:
    llm, _ = server(monkeypatch, library, chunks=False)
    plugin._hook_api_server()
    states = llm.output_processor.request_states
    states["s-1"] = SimpleNamespace(streaming_input=True, input_chunk_queue=None)
    asyncio.run(llm.add_request("s"))
    assert library.is_busy


# -- EngineCore -------------------------------------------------------------------------------


class Scheduler:
    def __init__(self) -> None:
        self.counts = (0, 0)
        self.num_waiting_for_streaming_input = 0

    def get_request_counts(self) -> tuple[int, int]:
        return self.counts

    def update_from_output(self) -> dict[int, Any]:
        return {}

    def finish_requests(self, request_ids: list[str]) -> None: ...

    def _update_request_as_session(self, session: Any, update: Any) -> int:
        return int(session.num_computed_tokens)


class EngineCore:
    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        return request, 0

    def add_request(self, request: Any) -> None:
        self.scheduler.counts, self.scheduler.num_waiting_for_streaming_input = (0, 1), 0


def subclass(kind: Any) -> Any:
    """A class of its own methods, so that wrapping leaves `kind` as it is."""
    return type(kind.__name__, (), dict(vars(kind)))


def test_the_engine_is_idle_between_two_chunks(
    monkeypatch: pytest.MonkeyPatch, plugin: vllm.Plugin, library: Library
) -> None:
    schedulers, cores = subclass(Scheduler), subclass(EngineCore)
    stand_in(monkeypatch, "vllm.v1.core.sched.scheduler", Scheduler=schedulers)
    stand_in(monkeypatch, "vllm.v1.engine.core", EngineCore=cores)
    plugin._hook_engine_core()
    core = cores(schedulers())
    chunk = SimpleNamespace(request_id="s-1")
    for _ in range(2):
        core.preprocess_add_request(chunk)
        assert library.is_busy, "before the scheduler knows"
        core.add_request(chunk)
        assert library.is_busy
        core.scheduler.num_waiting_for_streaming_input = 1  # answered; the session keeps its blocks
        core.scheduler.update_from_output()
        assert not library.is_busy


def test_vllm_appends_a_chunk_at_the_frontier_that_was_lost(
    monkeypatch: pytest.MonkeyPatch, plugin: vllm.Plugin
) -> None:
    @contextmanager
    def at_frontier(session: Any) -> Any:
        session.num_computed_tokens = 7
        yield
        session.num_computed_tokens = 0

    schedulers = subclass(Scheduler)
    stand_in(monkeypatch, "vllm.v1.core.sched.scheduler", Scheduler=schedulers)
    plugin._hook_sessions()
    session, scheduler = SimpleNamespace(num_computed_tokens=0), schedulers()
    assert scheduler._update_request_as_session(session, None) == 0, "not this plugin's scheduler"
    tenant: Any = SimpleNamespace(schedules_for=lambda one: one is scheduler, at_frontier=at_frontier)
    plugin.tenant = tenant
    assert scheduler._update_request_as_session(session, None) == 7
    assert session.num_computed_tokens == 0


def test_a_vllm_without_streaming_sessions(monkeypatch: pytest.MonkeyPatch, plugin: vllm.Plugin) -> None:
    without = type("Scheduler", (), {})
    stand_in(monkeypatch, "vllm.v1.core.sched.scheduler", Scheduler=without)
    plugin._hook_sessions()
    assert not hasattr(without, "_update_request_as_session")
