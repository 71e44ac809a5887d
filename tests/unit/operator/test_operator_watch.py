# SPDX-License-Identifier: Apache-2.0
"""kopf on a server of a few lines: what it lists and watches reaches the cache, and nothing is ever written.

Fidelity is the affair of tests/integration/operator; this says what our handlers and settings make of kopf.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import kopf
from aiohttp import web
from kubernetes.aio.client import Configuration
from simulated_cluster import Cluster

from valve_operator import watch
from valve_operator.api import Kind
from valve_operator.cache import Cache
from valve_operator.world import World

VERBS = ["list", "watch", "patch", "get"]
RESOURCES = {
    "/api/v1": [("nodes", "Node", False), ("pods", "Pod", True), ("namespaces", "Namespace", False)],
    "/apis/valve.io/v1alpha1": [
        ("colocationnodes", "ColocationNode", False),
        ("colocationpolicies", "ColocationPolicy", False),
    ],
}


class Server:
    """Discovery, lists, and watches that tell what `tell` is given."""

    def __init__(self, cluster: Cluster) -> None:
        self.lists: dict[str, dict[str, Any]] = {
            "nodes": cluster.nodes,
            "pods": cluster.pods,
            "colocationnodes": cluster.colonodes,
            "colocationpolicies": cluster.policies,
        }
        self.streams: dict[str, asyncio.Queue[dict[str, Any]]] = {
            name: asyncio.Queue() for name in self.lists
        }
        self.selectors: dict[str, str] = {}
        self.writes: list[str] = []
        self.streaming: set[str] = set()

    def tell(self, plural: str, kind: str, raw: dict[str, Any]) -> None:
        self.streams[plural].put_nowait({"type": kind, "object": raw})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method != "GET":
            self.writes.append(f"{request.method} {request.path}")
            return web.json_response({}, status=403)
        if request.path == "/api":
            return web.json_response({"versions": ["v1"]})
        if request.path == "/apis":
            version = {"version": "v1alpha1", "groupVersion": "valve.io/v1alpha1"}
            groups = [{"name": "valve.io", "versions": [version], "preferredVersion": version}]
            return web.json_response({"groups": groups})
        if request.path in RESOURCES:
            found = [
                {
                    "name": plural,
                    "singularName": kind.lower(),
                    "kind": kind,
                    "namespaced": spaced,
                    "verbs": VERBS,
                }
                for plural, kind, spaced in RESOURCES[request.path]
            ]
            return web.json_response({"resources": found})
        plural = request.path.rpartition("/")[2]
        if plural not in self.lists:
            return web.json_response({}, status=404)
        self.selectors[plural] = request.query.get("labelSelector", "")
        if "watch" not in request.query:
            items = list(self.lists[plural].values())
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": items})
        self.streaming.add(plural)
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            event = await self.streams[plural].get()
            await response.write(json.dumps(event).encode() + b"\n")


async def until(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def test_what_kopf_sees_reaches_the_cache_and_nothing_is_written() -> None:
    cluster = Cluster()
    cluster.add_node("a")
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.add_pod("one", "a")
    server = Server(cluster)

    async def story() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", server.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        made = Configuration(host=f"http://127.0.0.1:{port}")
        cache = Cache(World(), Kind("DaemonSet", "apps/v1", "daemonsets", "ns"), lambda: 0.0)
        stop = asyncio.Event()
        operator = asyncio.create_task(
            kopf.operator(
                registry=watch.registry(cache, made, None),
                settings=watch.settings(None),
                standalone=True,
                clusterwide=True,
                stop_flag=stop,
            )
        )
        world = cache.world
        try:
            await until(lambda: world.nodes and world.policies and world.colonodes and world.pods)
            await until(lambda: len(server.streaming) == 4)
            cache.dirty.clear()
            changed = json.loads(json.dumps(cluster.nodes["a"]))
            changed["metadata"]["labels"]["gpu"] = "yes"
            server.tell("nodes", "MODIFIED", changed)
            await until(lambda: world.nodes["a"].labels.get("gpu") == "yes")
            assert cache.dirty.is_set()
            server.tell("pods", "DELETED", cluster.pods["batch/one"])
            await until(lambda: not world.pods)
        finally:
            stop.set()
            await asyncio.wait({operator}, timeout=10)
            await runner.cleanup()

    asyncio.run(story())
    assert server.selectors["pods"] == "valve.io/workload=offline"
    assert server.selectors["nodes"] == ""
    assert server.writes == [], "no finalizer, no annotation, no event"
