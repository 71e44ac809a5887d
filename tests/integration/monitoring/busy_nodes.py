# SPDX-License-Identifier: Apache-2.0
"""Made-up traffic on real agents: an online engine that grows and shrinks, two offline ones that hold the
rest, lose memory and compute again. The tenants are processes under libvalve; tokens are only counted."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from node_live import SLAB, SLABS, NodeAgent, PodTenant
from prometheus_live import Prometheus

from valve_api.container import ContainerName

RUN_S = 60.0
REQUESTS, TOKENS, RECOMPUTED, LOST_BLOCKS, RECOMPUTED_TOKENS = range(5)
OFFLINE, ONLINE = {"valve.io/offline-memory-gib": 1}, {"valve.io/online-gpu": 1}
SLOTS = 6
"""Requests in an offline engine at a time."""


@dataclass(frozen=True, slots=True)
class Run:
    prometheus: Prometheus
    ports: Mapping[str, int]
    start: float
    end: float
    """Wall clock: the stretch in which both nodes worked."""


class Worker(threading.Thread):
    """The tenants of one node and what they do."""

    def __init__(self, agent: NodeAgent, runtime: Path, stack: contextlib.ExitStack, seed: int) -> None:
        super().__init__(name=f"work-{agent.node}")
        self.failure: BaseException | None = None
        self._random = random.Random(seed)
        self._online = self._pod(stack, agent, runtime, "online", "chat", f"vllm-{seed}", ONLINE)
        self._offline = [
            self._pod(stack, agent, runtime, "offline", "batch", f"{name}-{seed}", OFFLINE)
            for name in ("summaries", "embeddings")
        ]

    @staticmethod
    def _pod(
        stack: contextlib.ExitStack, agent: NodeAgent, runtime: Path, workload: str, namespace: str,
        name: str, resources: dict[str, int],
    ) -> PodTenant:  # fmt: skip
        tenant = PodTenant(agent, runtime, workload, ContainerName(namespace, name, "engine"), resources)
        stack.callback(tenant.close)
        assert tenant.ask("attach", timeout_ms=15_000)["attached"], tenant.ask("state")
        tenant.ask("arena", slabs=SLABS, slab_bytes=SLAB)
        return tenant

    def run(self) -> None:
        try:
            deadline = time.monotonic() + RUN_S
            while time.monotonic() < deadline:
                self._burst()
                self._batch()
        except BaseException as error:  # noqa: BLE001 - handed to the test, which fails with it
            self.failure = error

    def _burst(self) -> None:
        """One online request: it grows, generates, shrinks."""
        online, chance = self._online, self._random
        online.ask("busy")
        online.ask("count", counter=REQUESTS, n=1)
        held = online.ask("take", slabs=chance.randint(4, 36), timeout_s=1.0)["held"]
        for _ in range(chance.randint(2, 6)):
            online.ask("count", counter=TOKENS, n=chance.randint(5, 20))
            time.sleep(chance.uniform(0.03, 0.12))
        online.ask("idle", decode_gap_ns=chance.randint(5_000_000, 30_000_000))
        if len(held) > 12 and chance.random() < 0.6:
            online.ask("want", slabs=8)
            online.ask("return", slabs=held[8:])

    def _batch(self) -> None:
        """Offline between two bursts: count what was lost, take what is there, generate."""
        chance = self._random
        for tenant in self._offline:
            state = tenant.ask("poll")
            lost = [slab for kind, slab in state["events"] if slab in state["lost"]]
            if lost:
                tenant.ask("count", counter=LOST_BLOCKS, n=4 * len(lost))
                tenant.ask("count", counter=RECOMPUTED, n=min(SLOTS, len(lost)))
                tenant.ask("count", counter=RECOMPUTED_TOKENS, n=2 * len(lost))
            held = state["held"]
            owned = {str(slot): held[slot::SLOTS] for slot in range(SLOTS)}
            tokens = {str(slot): 50 * (slot + 1) for slot in range(SLOTS)}
            tenant.ask("own", owned=owned, tokens=tokens, pinned=[])
            tenant.ask("want", slabs=SLABS)
            tenant.ask("count", counter=REQUESTS, n=chance.randint(0, 2))
            tenant.ask("count", counter=TOKENS, n=3 * len(held))
        time.sleep(chance.uniform(0.05, 0.5))


def work(stack: contextlib.ExitStack, agents: Sequence[NodeAgent], runtime: Path) -> tuple[float, float]:
    """Let all nodes work for RUN_S: wall clock start and end. Raises what a worker raised."""
    workers = [Worker(agent, runtime, stack, seed) for seed, agent in enumerate(agents, start=1)]
    start = time.time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    end = time.time()
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure
    return start, end
