# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics and health of the plugin, over HTTP.

Why it exists: operators see how many units are lent and given, and that somebody was admitted short.

Threading model: counters are thread-safe; `collect` and the health check run in the HTTP server's threads.
Callers: plugin.py, state.py, serve.py, watchers.py, main.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from valve_deviceplugin.state import Node

_ALLOCATE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5)


class Metrics:
    """Every name begins with valve_deviceplugin_."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"valve_deviceplugin_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"valve_deviceplugin_{name}", text, labels, registry=self.registry)

        self._allocations = counter(
            "allocations", "Allocate calls: ok, repeated, remapped to one GPU, short of memory",
            "resource", "outcome",
        )  # fmt: skip
        self._registrations = counter("registrations", "Registrations that the kubelet accepted", "resource")
        self._lists = counter("lists", "Device lists sent to the kubelet", "resource")
        self._list_bytes = gauge("list_bytes", "Size of the last device list", "resource")
        self._store_failures = counter("ledger_write_failures", "Times the ledger could not be written")
        self._agent_up = gauge("agent_up", "1 while the node agent answers")
        self._kubelet_failures = counter(
            "podresources_failures", "Times the kubelet gave no pod-resources list"
        )
        self._seconds = Histogram(
            "valve_deviceplugin_allocate_seconds", "Duration of Allocate", ["resource"],
            buckets=_ALLOCATE_BUCKETS_S, registry=self.registry,
        )  # fmt: skip

    def allocated(self, resource: str, outcome: str) -> None:
        self._allocations.labels(resource, outcome).inc()

    def allocate_took(self, resource: str, seconds: float) -> None:
        self._seconds.labels(resource).observe(seconds)

    def registered(self, resource: str) -> None:
        self._registrations.labels(resource).inc()

    def listed(self, resource: str, size_bytes: int) -> None:
        self._lists.labels(resource).inc()
        self._list_bytes.labels(resource).set(size_bytes)

    def store_failed(self) -> None:
        self._store_failures.inc()

    def agent_up(self, up: bool) -> None:
        self._agent_up.set(int(up))

    def podresources_failed(self) -> None:
        self._kubelet_failures.inc()

    def watch(self, node: Node) -> None:
        """Collect the state's gauges from now on."""
        self.registry.register(_NodeCollector(node))


class _NodeCollector(Collector):
    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        gpus, used, short = self._node.totals()
        units = GaugeMetricFamily(
            "valve_deviceplugin_offline_units", "GiB of a GPU: capacity, lent, used by containers",
            labels=["gpu", "state"],
        )  # fmt: skip
        for gpu in gpus:
            units.add_metric([gpu.id, "capacity"], gpu.units)
            units.add_metric([gpu.id, "lent"], gpu.lent)
            units.add_metric([gpu.id, "used"], used.get(gpu.id, 0))
        yield units
        yield GaugeMetricFamily(
            "valve_deviceplugin_shortage_units", "GiB that admitted containers were short of", value=short
        )


class HttpServer:
    """Serves /metrics and /healthz. Raises OSError if the port is taken."""

    def __init__(self, metrics: Metrics, address: str, port: int, unhealthy: Callable[[], str]) -> None:
        """unhealthy: why the plugin is not healthy; empty when it is."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.split("?")[0] == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(metrics.registry))
                elif self.path == "/healthz":
                    why = unhealthy()
                    self._answer(503 if why else 200, "text/plain", f"{why or 'ok'}\n".encode())
                else:
                    self._answer(404, "text/plain", b"/metrics and /healthz are here\n")

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """A probe every few seconds is no news."""

        self._server = ThreadingHTTPServer((address, port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
