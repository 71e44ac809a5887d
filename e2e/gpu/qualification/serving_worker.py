# SPDX-License-Identifier: Apache-2.0
"""One engine of the serving part: transformers' continuous batching on a model of random weights.

    python3 serving_worker.py --role online|offline --model 1b|tiny [--priority high|low]

It says {"ready": ...}; then each line "SECONDS RATE" on stdin is one phase, answered by one JSON object.
Online: requests arrive by a Poisson process of RATE per second and stream their tokens. Offline: a full batch
all the time. Where VALVE_LIBRARY is set it tells libvalve when it turns busy and idle, as the engine adapters
do; the KV cache is static here.

Threading model: the main thread sends requests, one thread collects tokens, the engine has its own. Started
by serving.py.
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import json
import os
import random
import sys
import threading
import time
from typing import Any

MODELS = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32_000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
PROMPT_TOKENS = {"1b": 256, "tiny": 32}
NEW_TOKENS = {"1b": 64, "tiny": 8}
BATCH = {"1b": 64, "tiny": 4}
BATCHING = {"page_size": 32, "block_size": 32, "num_blocks": 2048, "max_batch_tokens": 2048}
"""As far as this version of transformers knows the names."""


class Tenant:
    """libvalve's view of this process; nothing where it is not preloaded."""

    def __init__(self) -> None:
        self._library: Any = None
        self._active = 0
        self._lock = threading.Lock()
        path = os.environ.get("VALVE_LIBRARY")
        if path:
            self._library = ctypes.CDLL(path)
            self._library.valve_idle.argtypes = [ctypes.c_uint64]

    def arrive(self) -> None:
        with self._lock:
            self._active += 1
            if self._active == 1 and self._library:
                self._library.valve_busy()

    def leave(self) -> None:
        with self._lock:
            self._active -= 1
            if self._active == 0 and self._library:
                self._library.valve_idle(0)


class Engine:
    """The manager, and the thread that takes what it makes."""

    def __init__(self, size: str, priority: str | None, tenant: Tenant) -> None:
        import torch
        from transformers import (
            AutoModelForCausalLM,
            ContinuousBatchingConfig,
            GenerationConfig,
            LlamaConfig,
        )

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if priority and self.device == "cuda":
            torch.cuda.Stream = _of_priority(torch.cuda.Stream, -1 if priority == "high" else 0)
        torch.manual_seed(0)
        config = LlamaConfig(max_position_embeddings=4096, eos_token_id=None, **MODELS[size])
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16 if self.device == "cuda" else torch.float32,
                attn_implementation="sdpa",
            ).eval()  # fmt: skip
        self.parameters = sum(p.numel() for p in model.parameters())
        self.vocabulary = config.vocab_size
        self.prompt_tokens, self.new_tokens, self.batch = PROMPT_TOKENS[size], NEW_TOKENS[size], BATCH[size]
        self._tenant = tenant
        known = inspect.signature(ContinuousBatchingConfig).parameters
        chosen = {name: value for name, value in BATCHING.items() if name in known}
        if "page_size" in chosen:
            chosen.pop("block_size", None)  # its older name
        batching = ContinuousBatchingConfig(**chosen)
        self.manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=-1, max_new_tokens=self.new_tokens
            ),
            continuous_batching_config=batching,
        )
        self.manager.start()
        self.sent: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}
        self.made: dict[str, int] = {}
        self.ended: set[str] = set()
        self.errors: list[str] = []
        threading.Thread(target=self._collect, daemon=True).start()

    def send(self, draw: random.Random) -> None:
        prompt = [draw.randrange(3, self.vocabulary) for _ in range(self.prompt_tokens)]
        self._tenant.arrive()
        now = time.monotonic()
        request = self.manager.add_request(prompt, max_new_tokens=self.new_tokens, streaming=True)
        self.sent[request] = now

    def _collect(self) -> None:
        while True:
            result = self.manager.get_result(timeout=1)
            if result is None:
                continue
            now = time.monotonic()
            self.times.setdefault(result.request_id, []).append(now)
            self.made[result.request_id] = len(result.generated_tokens)
            if result.is_finished():
                if result.error:
                    self.errors.append(str(result.error))
                self.ended.add(result.request_id)
                self._tenant.leave()

    @property
    def in_flight(self) -> int:
        return len(self.sent) - len(self.ended)

    def drain(self, within_s: float) -> None:
        until = time.monotonic() + within_s
        while self.in_flight and time.monotonic() < until:
            time.sleep(0.01)

    def forget(self) -> None:
        for kept in (self.sent, self.times, self.made, self.ended):
            kept.clear()


def _of_priority(base: Any, number: int) -> Any:
    """A class of streams whose priority is this unless said otherwise."""

    class Stream(base):  # type: ignore[misc]
        def __new__(cls, device: Any = None, priority: int = number, **more: Any) -> Any:
            return super().__new__(cls, device, priority, **more)

    return Stream


def online(engine: Engine, seconds: float, rate: float, draw: random.Random) -> dict[str, Any]:
    engine.forget()
    until = time.monotonic() + seconds
    due = time.monotonic()
    while (due := due + draw.expovariate(rate)) < until:
        time.sleep(max(0.0, due - time.monotonic()))
        engine.send(draw)
    engine.drain(60)
    ttft, tpot = [], []
    for request, times in engine.times.items():
        ttft.append(times[0] - engine.sent[request])
        if len(times) > 1:
            tpot.append((times[-1] - times[0]) / (len(times) - 1))
    return {
        "requests": len(engine.sent), "unfinished": engine.in_flight,
        "ttft_ms": _spread(ttft), "tpot_ms": _spread(tpot), "errors": engine.errors[:3],
    }  # fmt: skip


def offline(engine: Engine, seconds: float, draw: random.Random) -> dict[str, Any]:
    before, began = sum(engine.made.values()), time.monotonic()
    while time.monotonic() < began + seconds:
        while engine.in_flight < engine.batch:
            engine.send(draw)
        time.sleep(0.005)
    took = time.monotonic() - began
    tokens = sum(engine.made.values()) - before
    return {"tokens_per_s": round(tokens / took, 1), "tokens": tokens, "errors": engine.errors[:3]}


def _spread(values_s: list[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    if not ordered:
        return {"count": 0}

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 3)

    mean = round(sum(ordered) / len(ordered) * 1e3, 3)
    return {"count": len(ordered), "mean": mean, "p50": at(0.5), "p99": at(0.99), "max": at(1)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", required=True, choices=["online", "offline"])
    parser.add_argument("--model", required=True, choices=sorted(MODELS))
    parser.add_argument("--priority", choices=["high", "low"])
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers
    engine = Engine(arguments.model, arguments.priority, Tenant())
    draw = random.Random(1)
    engine.send(draw)  # warm: kernels are loaded, graphs made
    engine.drain(120)
    said = {"ready": True, "device": engine.device, "parameters": engine.parameters}
    print(json.dumps(said), file=answers, flush=True)
    for line in sys.stdin:
        seconds, rate = (float(word) for word in line.split())
        if arguments.role == "online":
            found = online(engine, seconds, rate, draw)
        else:
            found = offline(engine, seconds, draw)
        print(json.dumps(found), file=answers, flush=True)
    os._exit(0)  # the engine's thread would finish its requests first


if __name__ == "__main__":
    sys.exit(main())
