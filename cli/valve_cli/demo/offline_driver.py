# SPDX-License-Identifier: Apache-2.0
"""The demo's offline batch: a vLLM engine kept full of requests, under remote control.

Runs as a program in the *engine's* Python (not the demo's), so it imports nothing of
Valve: under Valve it is an ordinary vLLM process whose plugin makes it a tenant.  The
engine lives in this process (no engine-core child), so one stop stops all of it.

Threads: the main thread owns the engine; one daemon thread turns stdin lines into a
queue.  When there is nothing to do the main thread blocks on that queue and uses no CPU.
End of stdin ends the program: an orphan does not go on computing.

Commands, one JSON object per line on stdin:
  {"cmd": "load", "prompts": [{"ids": [...], "max_tokens": n}, ...]}
  {"cmd": "feed", "sequences": n, "phase": "..."}  keep n requests in flight, prompts in order, cyclic
  {"cmd": "stop"}     no new requests; the ones in flight go on
  {"cmd": "abort"}    drop what is in flight
  {"cmd": "exit"}

Report, one JSON object per line in --report (t_ns is CLOCK_MONOTONIC):
  ready {versions..., prefix_ids, suffix_ids, passages}   loaded   issued {id, prompt}
  step {tokens (cumulative), running, waiting}   done {id, prompt, t_first_ns, tokens}
  drained   aborted {ids}   bye   failed {error}
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
import traceback
from typing import Any, TextIO


class Reporter:
    """Appends JSON lines to the report file; each line is flushed whole."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "t_ns": time.monotonic_ns(), **fields})
        self._stream.write(line + "\n")
        self._stream.flush()


def read_commands(into: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Thread body: stdin lines to commands; end of stdin is `exit`."""
    for line in sys.stdin:
        if line.strip():
            into.put(json.loads(line))
    into.put({"cmd": "exit"})


def chat_parts(tokenizer: Any, passages: list[str]) -> dict[str, Any]:
    """Token ids around a user's text in this model's chat format, and of each passage.

    Two renderings that differ only in the user's text share the ids before and after it;
    a model without a chat template gets plain text (both parts empty)."""
    prefix: list[int] = []
    suffix: list[int] = []
    if getattr(tokenizer, "chat_template", None):
        probes = []
        for text in ("alpha", "zulu zulu"):
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            before, found, after = rendered.partition(text)
            if not found:
                raise ValueError("the chat template does not contain the user's text")
            probes.append((before, after))
        if probes[0] != probes[1]:
            raise ValueError("the chat template changes with the user's text")
        prefix = tokenizer(probes[0][0], add_special_tokens=False)["input_ids"]
        suffix = tokenizer(probes[0][1], add_special_tokens=False)["input_ids"]
    ids = [tokenizer(" " + text, add_special_tokens=False)["input_ids"] for text in passages]
    return {"prefix_ids": prefix, "suffix_ids": suffix, "passages": ids}


class Batch:
    """A vLLM engine with a fixed set of prompts and a wanted number of requests in flight."""

    def __init__(self, engine: Any, sampling: Any, reporter: Reporter) -> None:
        self.engine = engine
        self.reporter = reporter
        self._sampling = sampling
        self._prompts: list[dict[str, Any]] = []
        self._next_prompt = 0
        self._issued = 0
        self._target = 0
        self._phase = ""
        self._live: dict[str, dict[str, Any]] = {}
        self._tokens = 0

    def load(self, prompts: list[dict[str, Any]]) -> None:
        self._prompts = prompts
        self._next_prompt = 0
        self.reporter.say("loaded", prompts=len(prompts))

    def feed(self, sequences: int, phase: str) -> None:
        """From now on keep `sequences` in flight; a new phase starts at the first prompt again."""
        if not self._prompts:
            raise ValueError("feed before load: there are no prompts")
        if phase != self._phase:
            self._next_prompt = 0
        self._target, self._phase = sequences, phase
        self._top_up()

    def stop(self) -> None:
        self._target = 0
        if not self._live:
            self.reporter.say("drained", tokens=self._tokens)

    def abort(self) -> None:
        ids = list(self._live)
        self._target = 0
        self.engine.abort_request(ids)
        self._live.clear()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.reporter.say("aborted", ids=ids)

    @property
    def busy(self) -> bool:
        return bool(self._live)

    def _top_up(self) -> None:
        while len(self._live) < self._target:
            index = self._next_prompt % len(self._prompts)
            prompt = self._prompts[index]
            rid = f"{self._phase}-{self._issued:05d}"
            self._next_prompt += 1
            self._issued += 1
            self.reporter.say("issued", id=rid, prompt=index)
            self._live[rid] = {"prompt": index, "tokens": [], "t_first_ns": 0}
            self.engine.add_request(
                rid, {"prompt_token_ids": prompt["ids"]}, self._sampling(prompt["max_tokens"])
            )

    def step(self) -> None:
        """One engine step; reports finished requests and issues their successors."""
        outputs = self.engine.step()
        now = time.monotonic_ns()
        for out in outputs:
            state = self._live.get(out.request_id)
            if state is None:
                continue  # an output of a request that was aborted in this step
            new = list(out.outputs[0].token_ids)
            if new and not state["tokens"]:
                state["t_first_ns"] = now
            state["tokens"].extend(new)
            self._tokens += len(new)
            if out.finished:
                del self._live[out.request_id]
                self.reporter.say(
                    "done",
                    id=out.request_id,
                    prompt=state["prompt"],
                    t_first_ns=state["t_first_ns"],
                    tokens=state["tokens"],
                )
        started = sum(1 for state in self._live.values() if state["tokens"])
        self.reporter.say("step", tokens=self._tokens, running=started, waiting=len(self._live) - started)
        if self._target:
            self._top_up()
        elif not self._live:
            self.reporter.say("drained", tokens=self._tokens)


def serve(batch: Batch, commands: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Until `exit`: obey commands, step the engine while it has work."""
    while True:
        try:
            command = commands.get(block=not batch.busy)
        except queue.Empty:
            batch.step()
            continue
        match command["cmd"]:
            case "load":
                batch.load(command["prompts"])
            case "feed":
                batch.feed(command["sequences"], command["phase"])
            case "stop":
                batch.stop()
            case "abort":
                batch.abort()
            case "exit":
                return
            case other:
                raise ValueError(f"unknown command {other!r}")


def build(args: argparse.Namespace, reporter: Reporter) -> Batch:
    """Start the engine (tens of seconds) and report `ready`."""
    import torch
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=args.model,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_memory_bytes=args.kv_bytes,
            enable_prefix_caching=args.prefix_caching,
            enforce_eager=True,
            block_size=args.block_size,
            seed=0,
        )
    )

    def sampling(max_tokens: int) -> Any:
        return SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    with open(args.passages, encoding="utf-8") as handle:
        passages = [line.strip() for line in handle if line.strip() and not line.startswith("#")]
    reporter.say(
        "ready",
        pid=os.getpid(),
        vllm=vllm.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        kv_blocks=engine.vllm_config.cache_config.num_gpu_blocks,
        block_size=engine.vllm_config.cache_config.block_size,
        **chat_parts(engine.get_tokenizer(), passages),
    )
    return Batch(engine, sampling, reporter)


def main() -> int:
    parser = argparse.ArgumentParser(description="offline vLLM batch of `valve demo`")
    parser.add_argument("--model", required=True)
    parser.add_argument("--report", required=True, help="file that gets JSON lines")
    parser.add_argument("--passages", required=True, help="text file, one passage per line")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--kv-bytes", type=int, required=True, help="KV cache size in bytes")
    parser.add_argument("--core", type=int, required=True, help="CPU of the thread that computes")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core runs in this process
    with open(args.report, "a", encoding="utf-8") as stream:
        reporter = Reporter(stream)
        try:
            batch = build(args, reporter)
            os.sched_setaffinity(0, {args.core})
            commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
            threading.Thread(target=read_commands, args=(commands,), daemon=True).start()
            serve(batch, commands)
        except Exception as error:  # noqa: BLE001 - a program's outermost handler: reported, then exit 1
            reporter.say("failed", error=f"{type(error).__name__}: {error}")
            traceback.print_exc()
            return 1
        reporter.say("bye")
    return 0


if __name__ == "__main__":
    sys.exit(main())
