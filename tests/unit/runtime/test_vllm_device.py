# SPDX-License-Identifier: Apache-2.0
"""How much memory vLLM is told it has, and when its KV cache comes from the arena."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from valve_runtime import _lib, vllm, vllm_device
from valve_runtime.elastic import ArenaRefused, DemandSettings, EngineUnsupported

MIB = 1 << 20


@pytest.mark.parametrize("name", ["cpu", "cuda", "rocm", "xpu"])
def test_platforms(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """torch calls a ROCm device cuda; it is none that Valve manages."""
    is_cuda, is_cpu = (lambda: name == "cuda"), (lambda: name == "cpu")
    torchs = "cuda" if name == "rocm" else name
    platform: Any = SimpleNamespace(is_cuda=is_cuda, is_cpu=is_cpu, device_name=name, device_type=torchs)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))  # type: ignore[arg-type]
    assert vllm_device.platform() == name


BUDGETS = [
    # description, arena, vLLM's figure, explicit, own, expected; None: refused
    ("online: all of the pool, whatever is free now", 40, 7, False, 0, 40),
    ("offline: the limit less weights and activations", 24, 3, False, 9, 15),
    ("vLLM found nothing free: the arena is not free memory", 24, -2, False, 9, 15),
    ("the operator named a size", 40, 7, True, 0, 7),
    ("the operator named more than there is", 40, 70, True, 0, 40),
    ("nothing is left", 8, 3, False, 9, None),
]


@pytest.mark.parametrize(
    ("arena", "engine", "explicit", "own", "expected"), [c[1:] for c in BUDGETS], ids=[c[0] for c in BUDGETS]
)
def test_budget(arena: int, engine: int, explicit: bool, own: int, expected: int | None) -> None:
    def told() -> int:
        return vllm_device.budget(arena * MIB, engine * MIB, explicit=explicit, own_bytes=own * MIB)

    if expected is None:
        with pytest.raises(EngineUnsupported, match="need 9 MiB of the 8 MiB"):
            told()
    else:
        assert told() == expected * MIB


class Library:
    """libvalve, as far as opening an arena goes."""

    def __init__(self, device: str = "nvidia", answers: bool = True, denies: bool = False) -> None:
        self._device, self._answers, self._denies = device, answers, denies
        self.asked: list[str] = []

    def attach(self, timeout_ms: int) -> bool:
        return self._answers

    def device(self) -> str:
        return self._device

    def arena_open(self, nbytes: int, timeout_ms: int) -> _lib.Arena:
        self.asked.append(f"open {nbytes}")
        if self._denies:
            raise _lib.ArenaDenied("no memory left")
        return _lib.Arena(0x1000, 2 * MIB, 10)


def worker(**changes: Any) -> Any:
    cache = SimpleNamespace(kv_cache_memory_bytes=changes.get("explicit"))
    return SimpleNamespace(
        device="cuda:0", cache_config=cache, total_consumed=5 * MIB, peak_activation_memory=3 * MIB
    )


#   description, online, engine's device, library, obstacle, bytes that vLLM is told (else: offline's end)
OPENINGS = [
    ("offline on a GPU", False, "cuda", Library(), "", 12 * MIB),
    ("online on a GPU", True, "cuda", Library(), "", 20 * MIB),
    ("offline on the cpu device", False, "cpu", Library("cpu"), "", 20 * MIB),
    ("it cannot be elastic", False, "cuda", Library(), "sleep mode is enabled", 7),
    ("online on a GPU, the agent serves the cpu device", True, "cuda", Library("cpu"), "", 7),
    ("offline on a GPU, the agent serves the cpu device", False, "cuda", Library("cpu"), "", None),
    ("offline on a CPU, the agent serves a GPU", False, "cpu", Library(), "", None),
    ("online, no agent", True, "cuda", Library("", answers=False), "", 7),
    ("offline, no agent", False, "cuda", Library("", answers=False), "", None),
    ("online, no arena", True, "cuda", Library(denies=True), "", 7),
    ("offline, no arena", False, "cuda", Library(denies=True), "", None),
]


@pytest.mark.parametrize(
    ("online", "device", "library", "obstacle", "told"),
    [c[1:] for c in OPENINGS],
    ids=[c[0] for c in OPENINGS],
)
def test_where_the_kv_cache_comes_from(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    online: bool, device: str, library: Library, obstacle: str, told: int | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(vllm_device, "obstacle", lambda worker: obstacle)
    monkeypatch.setattr(vllm, "current", lambda device: nullcontext())
    plugin = vllm.Plugin(library, online=online, settings=DemandSettings())
    plugin.device = device
    wrong_device = library.device() not in ("", "nvidia" if device == "cuda" else "cpu")
    with caplog.at_level(logging.WARNING):
        if told is None:
            with pytest.raises(ArenaRefused, match="no device memory for this offline engine"):
                plugin._open_arena(worker(), 7)
        else:
            assert plugin._open_arena(worker(), 7) == told
    is_static = told in (7, None)
    assert (plugin.backing is None) is is_static
    if told == 7:
        assert "the KV cache stays static and is not shared" in caplog.text
    if wrong_device or obstacle:
        assert library.asked == [], "an arena that nobody can use was opened"
