# SPDX-License-Identifier: Apache-2.0
"""The load generator against a small HTTP server that streams like vLLM: what it sends and what it
makes of every way an answer can come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from valve_cli.demo.loadgen import LoadGenerator, Request
from valve_cli.demo.trace import Arrival


class Server:
    """Streams `max_tokens` tokens; the first prompt token says how it behaves."""

    FINE, BROKEN, SHORT, ERROR, BURSTS = range(5)

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        kind, wanted = body["prompt"][0], body["max_tokens"]
        if kind == self.BROKEN:
            return web.Response(status=500, text="out of order")
        response = web.StreamResponse()
        await response.prepare(request)
        if kind == self.ERROR:
            await response.write(b'data: {"error": {"message": "engine died"}}\n\n')
            return response
        tokens = list(range(wanted - 1 if kind == self.SHORT else wanted))
        size = 2 if kind == self.BURSTS else 1
        for at in range(0, len(tokens), size):
            chunk = {"choices": [{"text": "x", "token_ids": tokens[at : at + size]}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await asyncio.sleep(0.01)
        await response.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')
        return response


def replay(kinds: list[int], arrivals: list[Arrival]) -> tuple[list[Request], Server]:
    async def story() -> tuple[list[Request], Server]:
        server = Server()
        app = web.Application()
        app.router.add_post("/v1/completions", server.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            generator = LoadGenerator(
                f"http://127.0.0.1:{port}", "m", arrivals, lambda n, tokens: [kinds[n]] + [5] * (tokens - 1)
            )
            return await generator.run(), server
        finally:
            await runner.cleanup()

    return asyncio.run(story())


def test_requests_carry_the_traces_lengths_and_are_timed_in_order() -> None:
    arrivals = [Arrival(0.0, 3, 4), Arrival(0.05, 7, 1), Arrival(0.06, 2, 6)]
    requests, server = replay([Server.FINE] * 3, arrivals)
    assert [(len(b["prompt"]), b["max_tokens"]) for b in server.bodies] == [(3, 4), (7, 1), (2, 6)]
    for body in server.bodies:
        assert (body["temperature"], body["ignore_eos"], body["stream"]) == (0, True, True)
    for request in requests:
        assert not request.error
        assert request.due_ns <= request.sent_ns < request.first_ns <= request.end_ns
        assert request.token_ids == list(range(request.output_tokens))
    assert requests[1].tpot_ms is None, "one token has no time between tokens"
    assert requests[2].tpot_ms is not None
    assert requests[2].sent_ns < requests[0].end_ns + 10**9, "an open loop does not wait for answers"


def test_several_tokens_in_one_chunk_count_each() -> None:
    (request,), _ = replay([Server.BURSTS], [Arrival(0.0, 1, 5)])
    assert (request.error, request.received_tokens) == ("", 5)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Server.BROKEN, "HTTP 500: out of order"),
        (Server.SHORT, "3 tokens came, 4 were asked for"),
        (Server.ERROR, "engine died"),
    ],
    ids=["an HTTP error", "an answer cut short", "an error within the stream"],
)
def test_a_failed_request_is_recorded_and_the_others_go_on(kind: int, says: str) -> None:
    requests, _ = replay([kind, Server.FINE], [Arrival(0.0, 1, 4), Arrival(0.01, 1, 4)])
    assert says in requests[0].error
    assert requests[0].done
    assert requests[0].ttft_ms is None
    assert requests[0].tpot_ms is None
    assert requests[1].error == ""


def test_a_server_that_is_not_there_is_an_error_of_every_request() -> None:
    async def story() -> list[Request]:
        generator = LoadGenerator("http://127.0.0.1:9", "m", [Arrival(0.0, 1, 1)], lambda n, t: [1])
        return await generator.run()

    (request,) = asyncio.run(story())
    assert "ClientConnectorError" in request.error
