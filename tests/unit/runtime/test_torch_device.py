# SPDX-License-Identifier: Apache-2.0
"""An engine and its agent must mean the same device; libvalve must find the engine's GPU in the thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from valve_runtime import torch_device

CASES = [
    # description, agent's device, engine's device, words of the refusal
    ("a CPU engine and a cpu agent", "cpu", "cpu", ()),
    ("a GPU engine and an nvidia agent", "nvidia", "cuda", ()),
    ("no agent has answered yet", "", "cuda", ()),
    ("a GPU engine, a cpu agent", "cpu", "cuda", ("computes on cuda", "`valve agent --device nvidia`")),
    ("a CPU engine, an nvidia agent", "nvidia", "cpu", ("computes on cpu", "`valve agent --device cpu`")),
    ("a device of nobody", "nvidia", "xpu", ("computes on xpu", "does not manage")),
]


@pytest.mark.parametrize(("agent", "engine", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_mismatch(agent: str, engine: str, words: tuple[str, ...]) -> None:
    said = torch_device.mismatch(agent, engine)
    assert bool(said) is bool(words)
    for word in words:
        assert word in said


def test_the_engines_gpu_is_bound_to_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard alone binds no context (torch keeps it lazy), so a call that needs one comes before ours."""
    done: list[Any] = []

    @contextmanager
    def guard(device: Any) -> Iterator[None]:
        done.append(("guard", device.index))
        yield
        done.append("left")

    cuda = SimpleNamespace(device=guard, synchronize=lambda device: done.append(("bind", device.index)))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    with torch_device.current(SimpleNamespace(type="cuda", index=1)):
        done.append("arena")
    assert done == [("guard", 1), ("bind", 1), "arena", "left"]
    done.clear()
    with torch_device.current(SimpleNamespace(type="cpu", index=None)):
        done.append("arena")
    assert done == ["arena"]
