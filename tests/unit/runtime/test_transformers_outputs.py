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
from cb_stand_ins import Engine, State

from valve_runtime.elastic import LOST, DemandSettings, RuntimeFault
from valve_runtime.transformers_cb import Adapter


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
