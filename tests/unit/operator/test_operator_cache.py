# SPDX-License-Identifier: Apache-2.0
"""The cache: what wakes the loop, and what a census corrects."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

from simulated_cluster import Cluster

from valve_operator.api import Api, Kind
from valve_operator.cache import Cache
from valve_operator.world import World

DAEMONSETS = Kind("DaemonSet", "apps/v1", "daemonsets", "valve-system")


class Server(Api):
    """Lists what a simulated cluster holds. late: keys that the metadata list does not show yet."""

    def __init__(self, cluster: Cluster) -> None:
        self.tables: dict[str, dict[str, Any]] = {
            "Node": cluster.nodes,
            "ColocationPolicy": cluster.policies,
            "ColocationNode": cluster.colonodes,
            "Pod": cluster.pods,
            "DaemonSet": cluster.daemonsets,
        }
        self.late: set[str] = set()
        self.found: list[str] = []

    async def metadata(self, kind: Kind) -> AsyncIterator[dict[str, Any]]:
        for key, raw in self.tables[kind.name].items():
            if key not in self.late:
                yield {"metadata": raw["metadata"]}

    async def objects(self, kind: Kind) -> AsyncIterator[dict[str, Any]]:
        for raw in self.tables[kind.name].values():
            yield raw

    async def find(self, kind: Kind, name: str, namespace: str = "") -> dict[str, Any] | None:
        self.found.append(name)
        found: dict[str, Any] | None = self.tables[kind.name].get(
            f"{namespace}/{name}" if namespace else name
        )
        return found


def filled() -> tuple[Cluster, Server, Cache]:
    cluster = Cluster()
    cluster.add_node("a")
    cluster.add_node("b")
    cluster.add_policy("fleet")
    cluster.settle()
    cluster.add_pod("one", "a")
    return cluster, Server(cluster), Cache(World(), DAEMONSETS, lambda: 0.0)


def test_a_census_makes_the_world_complete() -> None:
    cluster, server, cache = filled()
    asyncio.run(cache.census(server))
    world = cache.world
    assert set(world.nodes) == set(world.colonodes) == {"a", "b"}
    assert set(world.policies) == {"fleet"}
    assert set(world.pods) == {"batch/one"}
    assert set(world.daemonsets) == set(cluster.daemonsets)
    assert cache.dirty.is_set()


def test_a_census_drops_what_is_gone_without_the_watch_having_told() -> None:
    cluster, server, cache = filled()
    asyncio.run(cache.census(server))
    del cluster.nodes["a"], cluster.pods["batch/one"]
    cluster.daemonsets.clear()
    cache.dirty.clear()
    asyncio.run(cache.census(server))
    assert set(cache.world.nodes) == {"b"}
    assert not cache.world.pods
    assert not cache.world.daemonsets
    assert cache.dirty.is_set()


def test_what_is_younger_than_the_list_is_looked_up_and_kept() -> None:
    cluster, server, cache = filled()
    asyncio.run(cache.census(server))
    cluster.add_node("young")
    cache.seen("Node", cluster.nodes["young"])
    server.late = {"young"}
    asyncio.run(cache.census(server))
    assert "young" in cache.world.nodes
    assert server.found[-1] == "young"


def test_an_update_that_changes_nothing_for_us_wakes_nobody() -> None:
    """A kubelet's heartbeat, for example."""
    cluster, server, cache = filled()
    asyncio.run(cache.census(server))
    cache.dirty.clear()
    node = cluster.nodes["a"]
    node["status"]["conditions"][0]["lastHeartbeatTime"] = "2026-01-01T00:00:01Z"
    cache.told("Node", node, deleted=False)
    assert not cache.dirty.is_set()
    node["metadata"]["labels"]["gpu"] = "yes"
    cache.told("Node", node, deleted=False)
    assert cache.dirty.is_set()


def test_figures_of_an_agent_wake_nobody_and_its_words_do() -> None:
    cluster, server, cache = filled()
    cluster.report("a")
    asyncio.run(cache.census(server))
    cache.dirty.clear()
    cluster.report("a", preemptions=7)
    cache.told("ColocationNode", cluster.colonodes["a"], deleted=False)
    assert not cache.dirty.is_set()
    assert cache.world.colonodes["a"].report.preemptions == 7
    cluster.report("a", ready=False)
    cache.told("ColocationNode", cluster.colonodes["a"], deleted=False)
    assert cache.dirty.is_set()


def test_a_deletion_is_taken_over() -> None:
    cluster, server, cache = filled()
    asyncio.run(cache.census(server))
    cache.told("Pod", cluster.pods["batch/one"], deleted=True)
    assert not cache.world.pods


def test_a_pod_that_ended_is_no_tenant_any_more() -> None:
    cluster, server, cache = filled()
    asyncio.run(cache.census(server))
    pod = cluster.pods["batch/one"]
    pod["status"]["phase"] = "Succeeded"
    cache.told("Pod", pod, deleted=False)
    assert not cache.world.pods


def test_a_watch_that_lags_behind_our_own_write_takes_nothing_back() -> None:
    cluster, server, cache = filled()
    asyncio.run(cache.census(server))
    before = copy.deepcopy(cluster.policies["fleet"])
    before["metadata"]["resourceVersion"] = "41"
    after = copy.deepcopy(before)
    after["metadata"]["resourceVersion"] = "107"
    after["status"] = {"nodes": 2}
    cache.seen("ColocationPolicy", after)  # the server's answer to a write
    cache.dirty.clear()
    cache.told("ColocationPolicy", before, deleted=False)
    assert cache.world.policies["fleet"].status == {"nodes": 2}
    assert not cache.dirty.is_set()


def test_a_late_deletion_does_not_hit_the_object_made_since() -> None:
    cluster, server, cache = filled()
    asyncio.run(cache.census(server))
    node = cluster.nodes["a"]
    node["metadata"]["resourceVersion"] = "200"
    cache.seen("Node", node)
    old = copy.deepcopy(node)
    old["metadata"]["resourceVersion"] = "150"
    cache.told("Node", old, deleted=True)
    assert "a" in cache.world.nodes
    old["metadata"]["resourceVersion"] = "201"
    cache.told("Node", old, deleted=True)
    assert "a" not in cache.world.nodes
