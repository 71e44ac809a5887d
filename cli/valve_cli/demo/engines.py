# SPDX-License-Identifier: Apache-2.0
"""The two engines as the demo drives them: `vllm serve` and the offline driver.

The same command lines with and without Valve; under Valve they are prefixed with
`valve run ... --`.  Single asyncio loop; called by `phases.py`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from valve_cli.demo.errors import DemoError, ProcessError
from valve_cli.demo.processes import Child, Tail, free_port
from valve_cli.demo.prompts import Prompts
from valve_cli.demo.settings import Settings

START_TIMEOUT_S = 240.0
MODEL_NAME = "demo"
DRIVER = Path(__file__).with_name("offline_driver.py")
PASSAGES = Path(__file__).with_name("data") / "passages.txt"
ENGINE_CORE = "VLLM::EngineCor"
"""What vLLM calls the process that computes, as far as a process's name goes: 15 characters."""


def engine_environment(settings: Settings, base: dict[str, str]) -> dict[str, str]:
    """Environment of both engines: no hub, no usage reports, one compute thread.  That thread is bound to
    the device's core by us: vLLM binds only where it starts workers of its own.

    The worker runs in the scheduler's process in every phase, as it must under Valve, so that
    the phases compare like with like: with VLLM_ENABLE_V1_MULTIPROCESSING=0 vLLM's CPU platform
    keeps the executor `uni`."""
    return base | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VALVE_KV_FLOOR_BLOCKS": str(settings.flags.online_floor_blocks),
        "VALVE_KV_IDLE_RETURN_S": str(settings.flags.online_idle_return_s),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


class OnlineEngine:
    """`vllm serve` on a port of this machine."""

    def __init__(self, child: Child, port: int, core: int) -> None:
        self.child = child
        self._core = core
        self.url = f"http://127.0.0.1:{port}"

    @classmethod
    async def start(
        cls, settings: Settings, env: dict[str, str], kv_bytes: int, prefix: Sequence[str], tag: str
    ) -> OnlineEngine:
        """Start it; `ready` waits until it serves."""
        flags = settings.flags
        port = free_port()
        command = [
            *prefix,
            str(settings.engine_python.with_name("vllm")),
            "serve",
            str(settings.model),
            f"--served-model-name={MODEL_NAME}",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--dtype={flags.online_dtype}",
            f"--max-model-len={flags.max_model_len}",
            f"--max-num-seqs={flags.online_max_seqs}",
            f"--max-num-batched-tokens={flags.batched_tokens}",
            f"--block-size={flags.block_size}",
            f"--kv-cache-memory-bytes={kv_bytes}",
            "--no-enable-prefix-caching",
            "--enforce-eager",
            "--distributed-executor-backend=uni",
            "--disable-uvicorn-access-log",
        ]
        return cls(
            await Child.start(
                "the online engine",
                command,
                settings.logs / f"online-{tag}.log",
                env,
            ),
            port,
            settings.core,
        )

    async def ready(self) -> None:
        """Until /health answers; then its compute thread is on the device's core.  Raises ProcessError if it
        dies or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                self.child.check()
                try:
                    async with session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            self.child.bind(ENGINE_CORE, self._core)
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass  # not listening yet: the loop's deadline decides
                if time.monotonic() > deadline:
                    raise ProcessError(
                        f"the online engine did not serve within {START_TIMEOUT_S:g} s", self.child.log
                    )
                await asyncio.sleep(0.5)

    async def stop(self) -> None:
        await self.child.stop()


class OfflineEngine:
    """The offline driver: commands down its stdin, reports up a file of JSON lines."""

    def __init__(self, child: Child, report: Path) -> None:
        self.child = child
        self._tail = Tail(report)
        self.info: dict[str, Any] = {}
        self.issued: dict[str, int] = {}
        self.finished: list[dict[str, Any]] = []
        self.aborted: set[str] = set()
        self.samples: list[tuple[int, int]] = []
        """(t_ns, cumulative tokens) after every engine step."""
        self.running = 0
        self._drained = self._aborts = 0
        self._stopped = False

    @classmethod
    async def start(
        cls, settings: Settings, env: dict[str, str], kv_bytes: int, prefix: Sequence[str], tag: str
    ) -> OfflineEngine:
        flags = settings.flags
        settings.logs.mkdir(parents=True, exist_ok=True)
        report = settings.logs / f"offline-{tag}.jsonl"
        report.unlink(missing_ok=True)
        command = [
            *prefix,
            str(settings.engine_python),
            "-P",  # no sibling of the driver on its path: one called trace.py would hide the library's
            str(DRIVER),
            f"--model={settings.model}",
            f"--report={report}",
            f"--passages={PASSAGES}",
            f"--dtype={flags.offline_dtype}",
            f"--max-model-len={flags.max_model_len}",
            f"--max-num-seqs={settings.offline.sequences}",
            f"--max-num-batched-tokens={flags.offline_batched_tokens}",
            f"--block-size={flags.block_size}",
            f"--kv-bytes={kv_bytes}",
            f"--core={settings.core}",
            "--prefix-caching",
        ]
        log = settings.logs / f"offline-{tag}.log"
        return cls(await Child.start("the offline engine", command, log, env, stdin=True), report)

    def poll(self) -> None:
        """Take in what the driver has reported since the last call.  Raises ProcessError."""
        for line in self._tail.lines():
            event = json.loads(line)
            match event["event"]:
                case "step":
                    self.samples.append((event["t_ns"], event["tokens"]))
                    self.running = event["running"]
                case "issued":
                    self.issued[event["id"]] = event["prompt"]
                case "done":
                    self.finished.append(event)
                case "aborted":
                    self.aborted.update(event["ids"])
                    self._aborts += 1
                case "drained":
                    self._drained += 1
                case "ready":
                    self.info = event
                case "failed":
                    raise ProcessError(f"the offline engine failed: {event['error']}", self.child.log)
        self.child.check()

    async def ready(self) -> Prompts:
        """Until the engine is up; returns its tokens of the demo's text."""
        await self._until(lambda: bool(self.info), START_TIMEOUT_S, "start")
        return Prompts.of(self.info["prefix_ids"], self.info["suffix_ids"], self.info["passages"])

    async def load(self, prompts: Sequence[tuple[list[int], int]]) -> None:
        await self._command(cmd="load", prompts=[{"ids": ids, "max_tokens": n} for ids, n in prompts])

    async def feed(self, sequences: int, phase: str) -> None:
        await self._command(cmd="feed", sequences=sequences, phase=phase)

    async def drain(self, timeout_s: float) -> None:
        """No new requests; until the last one has ended."""
        before = self._drained
        await self._command(cmd="stop")
        await self._until(lambda: self._drained > before, timeout_s, "finish its requests")

    async def abort(self) -> None:
        """Drop what is in flight; until the engine is empty."""
        before = self._aborts
        await self._command(cmd="abort")
        await self._until(lambda: self._aborts > before, 60.0, "drop its requests")

    def suspend(self) -> None:
        """Stop the whole group (SIGSTOP), so that an idle engine cannot disturb a measurement."""
        self.child.signal(signal.SIGSTOP)
        self._stopped = True

    def resume(self) -> None:
        if self._stopped:
            self.child.signal(signal.SIGCONT)
            self._stopped = False

    async def stop(self) -> None:
        self.resume()
        if not self.child.exited:
            with suppress(DemoError):  # it has ended already: stopping the group below is enough
                await self._command(cmd="exit")
            await self.child.wait(10.0)
        await self.child.stop()
        self._tail.close()

    async def _command(self, **fields: Any) -> None:
        await self.child.write_line(json.dumps(fields))

    async def _until(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            self.poll()
            if done():
                return
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"the offline engine did not {what} within {timeout_s:g} s", self.child.log
                )
            await asyncio.sleep(0.1)
