# SPDX-License-Identifier: Apache-2.0
"""Replays a trace against the online engine and times every token.

Open loop: a request is sent at its time whether or not earlier ones have ended.  Each is
a streaming `/v1/completions` call with prompt token ids, greedy, `ignore_eos` and the
trace's output length, so the work does not depend on what the model says.  Clock:
CLOCK_MONOTONIC, as in the agent's event log.  One asyncio task per request; called by
the demo's phases.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from valve_cli.demo.trace import Arrival


@dataclass
class Request:
    """What one online request did.  Times are CLOCK_MONOTONIC nanoseconds."""

    number: int
    prompt_tokens: int
    output_tokens: int
    due_ns: int
    sent_ns: int = 0
    first_ns: int = 0
    end_ns: int = 0
    received_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def done(self) -> bool:
        return self.end_ns > 0

    @property
    def ttft_ms(self) -> float | None:
        return (self.first_ns - self.sent_ns) / 1e6 if self.first_ns and not self.error else None

    @property
    def tpot_ms(self) -> float | None:
        """(last − first) / (n − 1); undefined for one token."""
        if self.error or self.received_tokens < 2:
            return None
        return (self.end_ns - self.first_ns) / 1e6 / (self.received_tokens - 1)


class LoadGenerator:
    """One replay.  `requests` may be read while it runs (the display does)."""

    def __init__(
        self,
        url: str,
        model: str,
        arrivals: Sequence[Arrival],
        prompt: Callable[[int, int], list[int]],
        timeout_s: float = 120.0,
    ) -> None:
        self._url = url
        self._model = model
        self._arrivals = arrivals
        self._bodies = [
            json.dumps(
                {
                    "model": model,
                    "prompt": prompt(number, arrival.context_tokens),
                    "max_tokens": arrival.output_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "return_token_ids": True,
                }
            ).encode()
            for number, arrival in enumerate(arrivals)
        ]
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self.requests: list[Request] = []
        self.begin_ns = 0

    async def run(self) -> list[Request]:
        """Send everything, wait for every answer.  A failed request is recorded, not raised."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=self._timeout) as session:
            self.begin_ns = time.monotonic_ns()
            self.requests = [
                Request(n, a.context_tokens, a.output_tokens, self.begin_ns + round(a.at_s * 1e9))
                for n, a in enumerate(self._arrivals)
            ]
            tasks = []
            try:
                for request, body in zip(self.requests, self._bodies, strict=True):
                    wait = (request.due_ns - time.monotonic_ns()) / 1e9
                    if wait > 0:
                        await asyncio.sleep(wait)
                    tasks.append(asyncio.create_task(self._one(session, request, body)))
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return self.requests

    async def warm_up(self, lengths: Sequence[int]) -> None:
        """A few requests that are not measured: the engine's first ones pay for lazy set-up."""
        async with aiohttp.ClientSession(timeout=self._timeout) as session:
            for number in lengths:
                request = Request(-1, 0, 4, time.monotonic_ns())
                await self._one(session, request, self._bodies[number])
                if request.error:
                    raise RuntimeError(f"the online engine failed on its warm-up request: {request.error}")

    async def _one(self, session: aiohttp.ClientSession, request: Request, body: bytes) -> None:
        request.sent_ns = time.monotonic_ns()
        last_ns = 0
        try:
            async with session.post(
                f"{self._url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    request.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                    return
                async for line in response.content:
                    now = time.monotonic_ns()
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        break
                    ids = tokens_of(json.loads(data))
                    if ids:
                        request.first_ns = request.first_ns or now
                        last_ns = now
                        request.received_tokens += len(ids)
                        request.token_ids.extend(ids)
            if request.received_tokens != request.output_tokens and request.number >= 0:
                request.error = (
                    f"{request.received_tokens} tokens came, {request.output_tokens} were asked for"
                )
        except (TimeoutError, aiohttp.ClientError, ValueError, KeyError) as error:
            request.error = f"{type(error).__name__}: {error}"
        finally:
            request.end_ns = last_ns or time.monotonic_ns()


def tokens_of(chunk: dict[str, object]) -> list[int]:
    """Token ids of one streamed chunk; ValueError carries the engine's error message."""
    if "error" in chunk:
        raise ValueError(f"the engine answered {chunk['error']!r}")
    choices = chunk["choices"]
    if not isinstance(choices, list) or not choices:
        return []
    ids = choices[0].get("token_ids")
    return [int(i) for i in ids] if ids else []
