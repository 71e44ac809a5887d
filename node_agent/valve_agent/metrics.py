# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of one agent, from its last snapshot.

Why it exists: operators watch preemptions, reclaims and who holds what. A scrape reads the snapshot that
the server thread left behind (at most a second old), so it can never delay the agent.

Threading model: `Collector.collect` runs in the HTTP server's thread; `publish` in the server thread (one
reference is stored). Callers: main.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_PER_TENANT = (
    ("valve_requests", "requests", "Requests that the tenant's engines have seen"),
    ("valve_tokens", "tokens", "Tokens that the tenant's engines have generated"),
    ("valve_recomputed_requests", "recomputed", "Requests recomputed after a reclaim"),
    ("valve_recomputed_tokens", "recomputed_tokens", "Tokens computed again after a reclaim"),
    ("valve_lost_blocks", "lost_blocks", "KV blocks lost to reclaims"),
)


class Collector:
    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None

    def publish(self, document: dict[str, Any]) -> None:
        self._last = document

    def collect(self) -> Iterable[Metric]:
        status = self._last
        if status is None:
            return
        gate = status["gate"]
        yield _counter("valve_preemptions", "Pauses of offline for any reason", gate["pauses"])
        yield _counter("valve_resumes", "Times that offline could go on", gate["resumes"])
        yield _counter(
            "valve_pause_violations", "Paused processes that somebody continued", gate["violations"]
        )
        yield _counter(
            "valve_killed",
            "Processes killed: unpausable or unaccounted for",
            status["killed"] + gate["kills"],
        )
        yield _histogram(status["preempt_buckets_us"], gate["latency_ns"])
        yield _gauge("valve_paused", "1 while offline is paused", int(status["offline_paused"]))
        reclaims = status["reclaims"]
        yield _counter("valve_reclaims", "Reclaim operations", reclaims["total"])
        yield _counter("valve_reclaimed_bytes", "Bytes taken back from offline", reclaims["bytes"])
        yield _counter(
            "valve_reclaimed_in_use_bytes", "Of these, bytes that requests owned", reclaims["bytes_in_use"]
        )
        slabs = status["slabs"]
        yield _gauge("valve_slab_bytes", "Bytes in one slab", slabs["bytes_each"])
        yield _gauge("valve_reservation_slabs", "Free slabs kept for online", slabs["reservation"])
        yield _gauge("valve_free_slabs", "Slabs that nobody holds", slabs["free"])
        held = GaugeMetricFamily("valve_slabs", "Slabs of a tenant", labels=["tenant", "role", "state"])
        busy = GaugeMetricFamily(
            "valve_busy", "1 while an online engine has a request", labels=["tenant", "pid"]
        )
        totals = {key: CounterMetricFamily(name, text, labels=["tenant"]) for name, key, text in _PER_TENANT}
        for name, tenant in status["tenants"].items():
            for state in ("held", "want", "limit"):
                held.add_metric([name, tenant["role"], state], tenant[f"{state}_slabs"])
            for process in tenant["processes"]:
                if "busy" in process:
                    busy.add_metric([name, str(process["pid"])], int(process["busy"]))
            for key, family in totals.items():
                family.add_metric([name], tenant[key])
        yield held
        yield busy
        yield from totals.values()


class MetricsServer:
    """Serves /metrics on 127.0.0.1. Raises OSError if the port is taken."""

    def __init__(self, collector: Collector, port: int, address: str = "127.0.0.1") -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, address, registry)
        self.port = int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _histogram(buckets_us: dict[str, int], sum_ns: int) -> HistogramMetricFamily:
    cumulative: list[tuple[str, float]] = []
    total = 0
    for bound, count in buckets_us.items():
        total += count
        cumulative.append(("+Inf" if bound == "inf" else str(float(bound) / 1e6), total))
    return HistogramMetricFamily(
        "valve_preemption_latency_seconds", "Online turned busy to offline evicted", buckets=cumulative,
        sum_value=sum_ns / 1e9,
    )  # fmt: skip
