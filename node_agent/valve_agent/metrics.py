# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of one agent, from its last snapshot.

Why it exists: operators watch preemptions, reclaims and who holds what. A scrape reads the snapshot that
the server thread left behind (at most a second old), so it can never delay the agent.

Names follow Prometheus' rules: base units, `_total` on counters, one thing per name. Labels: `device`
everywhere; a tenant's `tenant`, `workload` and, in a cluster, `tenant_namespace`, `tenant_pod`,
`tenant_container` (not `namespace` and `pod`: those are the agent's own, put there by the scrape). Which node
it is the scrape says too. What changes within milliseconds is a counter of seconds beside the gauge.

Threading model: `Collector.collect` runs in the HTTP server's thread; `publish` in the server thread (one
reference is stored). Callers: main.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

DEVICE = ("device",)
TENANT = ("device", "tenant", "workload", "tenant_namespace", "tenant_pod", "tenant_container")

_DEVICE_COUNTERS = (
    ("valve_preemptions", "Times that offline was stopped for an online request", ("gate", "samples")),
    ("valve_pauses", "Times that offline was stopped, whatever the reason", ("gate", "pauses")),
    ("valve_resumes", "Times that offline could go on", ("gate", "resumes")),
    ("valve_pause_timeouts", "Pauses that were not confirmed at the first attempt", ("gate", "timeouts")),
    ("valve_pause_violations", "Paused processes that somebody continued", ("gate", "violations")),
    ("valve_missed_busy_periods", "Busy periods shorter than the gate's look", ("gate", "missed_busy")),
    ("valve_reclaims", "Times that memory was taken back from offline", ("reclaims", "total")),
    ("valve_reclaimed_bytes", "Memory taken back from offline", ("reclaims", "bytes")),
    ("valve_reclaimed_in_use_bytes", "Of it, what requests owned", ("reclaims", "bytes_in_use")),
    ("valve_harmed_requests", "Offline requests that lost memory", ("reclaims", "requests_harmed")),
    ("valve_online_busy_seconds", "Time with a request in an online engine", ("usage_s", "online_busy")),
    ("valve_offline_paused_seconds", "Time in which offline was stopped", ("usage_s", "offline_paused")),
)
_TENANT_COUNTERS = (
    ("valve_tenant_requests", "requests", "Requests that the tenant's engines have seen"),
    ("valve_tenant_tokens", "tokens", "Tokens that the tenant's engines have generated"),
    ("valve_tenant_recomputed_requests", "recomputed", "Requests recomputed after a reclaim"),
    ("valve_tenant_recomputed_tokens", "recomputed_tokens", "Tokens computed again after a reclaim"),
    ("valve_tenant_lost_blocks", "lost_blocks", "KV blocks lost to reclaims"),
)
_TENANT_MEMORY = (
    ("valve_tenant_memory_bytes", "held_slabs", "Device memory that the tenant holds"),
    ("valve_tenant_memory_wanted_bytes", "want_slabs", "Device memory that it could use"),
    ("valve_tenant_memory_limit_bytes", "limit_slabs", "Most device memory that it may hold"),
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
        yield from _agent(status)
        yield from _merged(_device(gpu) for gpu in status["gpus"])
        yield from _merged(_tenants(gpu) for gpu in status["gpus"])
        if status.get("cluster"):
            yield from _cluster(status["cluster"])


class MetricsServer:
    """Serves /metrics. Raises OSError if the port is taken."""

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


def _agent(status: Mapping[str, Any]) -> Iterable[Metric]:
    info = GaugeMetricFamily("valve_agent_info", "1; which policy holds here", labels=["device", "policy"])
    for gpu in status["gpus"]:
        info.add_metric([gpu["id"], gpu["policy"]], 1)
    yield info
    uptime_s = max(gpu["uptime_s"] for gpu in status["gpus"])
    yield _gauge("valve_agent_uptime_seconds", "Since the agent's start", uptime_s)
    yield _gauge(
        "valve_agent_unusable_gpus", "GPUs of this node that cannot be shared", len(status["unusable"])
    )
    yield CounterMetricFamily("valve_rejects", "Peers that were refused", value=status["rejects"])


def _merged(of_each: Iterable[Iterable[Metric]]) -> Iterable[Metric]:
    """Metrics of several devices: one family for each name."""
    families: dict[str, Metric] = {}
    for metrics in of_each:
        for metric in metrics:
            families.setdefault(metric.name, metric)
            if families[metric.name] is not metric:
                families[metric.name].samples += metric.samples
    return families.values()


def _device(status: Mapping[str, Any]) -> Iterable[Metric]:
    device = [status["id"]]
    for name, text, (part, key) in _DEVICE_COUNTERS:
        yield _counter(name, text, DEVICE, device, status[part][key])
    killed = status["killed"] + status["gate"]["kills"]
    yield _counter("valve_kills", "Processes killed: unpausable or unaccounted for", DEVICE, device, killed)
    histogram = HistogramMetricFamily(
        "valve_preemption_latency_seconds", "Online turned busy to offline evicted", labels=DEVICE
    )
    histogram.add_metric(
        device, _cumulative(status["preempt_buckets_us"]), status["gate"]["latency_ns"] / 1e9
    )
    yield histogram
    slabs, each = status["slabs"], status["slabs"]["bytes_each"]
    busy = any(
        process.get("busy") for tenant in status["tenants"].values() for process in tenant["processes"]
    )
    for name, text, value in (
        ("valve_offline_paused", "1 while offline is stopped", int(status["offline_paused"])),
        ("valve_online_busy", "1 while a request is in an online engine", int(busy)),
        ("valve_offline_growth_stopped", "1 while offline gets nothing new", int(status["growth_stopped"])),
        ("valve_device_memory_bytes", "Memory that is shared out", slabs["total"] * each),
        ("valve_device_free_bytes", "Memory that nobody holds", max(0, slabs["free"]) * each),
        ("valve_reservation_bytes", "Free memory kept for online", slabs["reservation"] * each),
        ("valve_online_floor_bytes", "Memory that offline never gets", slabs["online_floor"] * each),
        ("valve_slab_bytes", "Memory in one slab", each),
    ):
        yield _gauge(name, text, value, DEVICE, device)


def _tenants(status: Mapping[str, Any]) -> Iterable[Metric]:
    each, tenants = status["slabs"]["bytes_each"], status["tenants"]

    def labels(name: str) -> list[str]:
        known = tenants[name]["labels"]
        place = [known.get(part, "") for part in ("namespace", "pod", "container")]
        return [status["id"], name, tenants[name]["role"], *place]

    for metric, key, text in _TENANT_COUNTERS:
        counter = CounterMetricFamily(metric, text, labels=TENANT)
        for name, tenant in tenants.items():
            counter.add_metric(labels(name), tenant[key])
        yield counter
    for metric, key, text in _TENANT_MEMORY:
        memory = GaugeMetricFamily(metric, text, labels=TENANT)
        for name, tenant in tenants.items():
            memory.add_metric(labels(name), tenant[key] * each)
        yield memory
    processes = GaugeMetricFamily("valve_tenant_processes", "Engine processes attached", labels=TENANT)
    busy = GaugeMetricFamily(
        "valve_tenant_busy",
        "Online: 1 while it has a request. Offline: 1 while it may compute",
        labels=TENANT,
    )
    gap = GaugeMetricFamily(
        "valve_tenant_decode_gap_seconds",
        "Online: longest recent time between two decode iterations",
        labels=TENANT,
    )
    for name, tenant in tenants.items():
        online = tenant["role"] == "online"
        processes.add_metric(labels(name), len(tenant["processes"]))
        computes = any(process.get("busy") for process in tenant["processes"])
        may = bool(tenant["processes"]) and not status["offline_paused"]
        busy.add_metric(labels(name), int(computes if online else may))
        if online:
            gap.add_metric(labels(name), tenant["decode_gap_ns"] / 1e9)
    yield processes
    yield busy
    yield gap


def _cluster(cluster: Mapping[str, Any]) -> Iterable[Metric]:
    """What only an agent on a Kubernetes node has (kube/node.py)."""
    for name, text, value in (
        ("valve_apiserver_connected", "1 while settings can be heard", int(not cluster["api_error"])),
        ("valve_kubelet_connected", "1 while the kubelet answers", int(not cluster["kubelet_error"])),
        ("valve_settings_followed", "1 while the newest settings hold here", int(cluster["ready"])),
        ("valve_settings_generation", "metadata.generation in force", cluster["generation"]),
    ):
        yield _gauge(name, text, value)
    yield CounterMetricFamily(
        "valve_status_writes", "Times that the status was written", value=cluster["status_writes"]
    )


def _counter(
    name: str, text: str, labels: tuple[str, ...], values: list[str], value: float
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    family.add_metric(values, value)
    return family


def _gauge(
    name: str, text: str, value: float, labels: tuple[str, ...] = (), values: list[str] | None = None
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    family.add_metric(values or [], value)
    return family


def _cumulative(buckets_us: Mapping[str, int]) -> list[tuple[str, float]]:
    cumulative: list[tuple[str, float]] = []
    total = 0
    for bound, count in buckets_us.items():
        total += count
        cumulative.append(("+Inf" if bound == "inf" else str(float(bound) / 1e6), total))
    return cumulative
