# SPDX-License-Identifier: Apache-2.0
"""/healthz, /readyz and /metrics.

Alive: the event loop turns and no part of the operator has ended (main ends with it). Ready: the World is
complete and the webhook accepts connections; a replica that does not lead is ready too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from valve_api.names import METRIC_PREFIX
from valve_operator.api import Api
from valve_operator.cache import Cache
from valve_operator.executor import Executor
from valve_operator.loop import Loop
from valve_operator.webhook import Webhook


class Figures(Collector):
    """The operator's own metrics, read when scraped."""

    def __init__(
        self,
        leads: Callable[[], bool],
        api: Api,
        cache: Cache,
        executor: Executor,
        loop: Loop,
        webhook: Webhook | None,
    ) -> None:
        self._leads, self._api, self._cache = leads, api, cache
        self._executor, self._loop, self._webhook = executor, loop, webhook

    def collect(self) -> Iterator[Metric]:
        prefix = f"{METRIC_PREFIX}_operator"
        world = self._cache.world
        yield GaugeMetricFamily(f"{prefix}_leader", "1 on the replica that leads.", int(self._leads()))
        yield GaugeMetricFamily(f"{prefix}_nodes", "Nodes in the cluster.", len(world.nodes))
        yield GaugeMetricFamily(f"{prefix}_policies", "ColocationPolicies.", len(world.policies))
        yield GaugeMetricFamily(
            f"{prefix}_slowest_reconcile_seconds", "CPU time of the longest run so far.", self._loop.slowest_s
        )
        requests = CounterMetricFamily(f"{prefix}_requests", "Requests to the API server.", labels=["verb"])
        for verb, count in sorted(self._api.requests.items()):
            requests.add_metric([verb], count)
        yield requests
        yield CounterMetricFamily(f"{prefix}_events", "Objects seen.", self._cache.events)
        yield CounterMetricFamily(f"{prefix}_reconciles", "Runs of reconcile.", self._loop.runs)
        actions = CounterMetricFamily(f"{prefix}_actions", "Actions, by outcome.", labels=["outcome"])
        actions.add_metric(["done"], self._executor.done)
        actions.add_metric(["failed"], self._executor.failed)
        yield actions
        if self._webhook is not None:
            answers = self._webhook.answered
            admitted = CounterMetricFamily(f"{prefix}_admissions", "Webhook answers.", labels=["answer"])
            admitted.add_metric(["pod-changed"], answers.changed)
            admitted.add_metric(["pod-refused"], answers.refused)
            admitted.add_metric(["policy-refused"], answers.policies_refused)
            yield admitted


async def serve(
    health_port: int, metrics_port: int, ready: Callable[[], Awaitable[str]], figures: Figures
) -> None:
    """Serves until cancelled; a port of 0 serves nothing. ready: "" or what is missing."""
    registry = CollectorRegistry()
    registry.register(figures)

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def readyz(_: web.Request) -> web.Response:
        missing = await ready()
        return web.Response(status=503 if missing else 200, text=f"{missing or 'ready'}\n")

    async def metrics(_: web.Request) -> web.Response:
        text = generate_latest(registry)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    runners = []
    for port, routes in (
        (health_port, [web.get("/healthz", healthz), web.get("/readyz", readyz)]),
        (metrics_port, [web.get("/metrics", metrics)]),
    ):
        if port:
            app = web.Application()
            app.add_routes(routes)
            runner = web.AppRunner(app, handle_signals=False, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, None, port).start()
            runners.append(runner)
    try:
        await asyncio.Event().wait()
    finally:
        for runner in runners:
            await runner.cleanup()


async def accepts(port: int) -> bool:
    """Somebody listens on a port of this machine."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return True
    return False
