# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (a table of queries and sentences)
"""The four dashboards: fleet, node, device, policy.

Who reads them: fleet, whoever is on call (is something wrong, and where); node, whoever looks after one
machine; device, whoever asks why a request was slow or a batch job does not move; policy, whoever changes
settings and wants to see what they do.

`node` is a label that the scrape gives (the chart's PodMonitor). Threading model: constants. Callers:
__main__.py, the tests.
"""

from __future__ import annotations

from valve_dashboards.panels import Board, Kind, Panel, Query, Row, Unit, Variable

N = 'node=~"$node"'
D = 'node=~"$node",device=~"$device"'
RATE = "[$__rate_interval]"
P1_S = 0.001
"""Promise P1: offline is off the device within a millisecond."""

_NODE = Variable("node", "Node", "label_values(valve_agent_info, node)")
_DEVICE = Variable("device", "Device", 'label_values(valve_device_memory_bytes{node=~"$node"}, device)')
_POLICY = Variable("policy", "Policy", "label_values(valve_agent_info, policy)")


def _quantile(share: float, selector: str, by: str = "") -> str:
    inner = f"sum by (le{by}) (rate(valve_preemption_latency_seconds_bucket{selector}{RATE}))"
    return f"histogram_quantile({share}, {inner})"


def _latency(selector: str, width: int = 12, height: int = 8) -> Panel:
    return Panel(
        "Preemption latency", "From an online engine turning busy to no offline work running. The promise is "
        "p99 below 1 ms. Above it: see the runbook ValvePreemptionSlow.", Kind.LINES, Unit.SECONDS, width,
        height, tuple(Query(_quantile(q, selector), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)),
        threshold=P1_S,
    )  # fmt: skip


def _memory(selector: str, width: int = 12) -> Panel:
    inside = selector[1:-1]
    joined = f"{inside}," if inside else ""
    free = f"valve_device_free_bytes{selector}"
    return Panel(
        "Memory: who has it", "Held by online and offline tenants, kept free for online (reservation), and "
        "free. Adds up to the devices.", Kind.STACKED, Unit.BYTES, width, 8,
        (
            Query(f'sum(valve_tenant_memory_bytes{{{joined}workload="online"}}) or vector(0)', "online"),
            Query(f'sum(valve_tenant_memory_bytes{{{joined}workload="offline"}}) or vector(0)', "offline"),
            # What is kept is what is free, up to the reservation: (a < b) or b is the smaller of two series.
            Query(f"sum((valve_reservation_bytes{selector} < {free}) or {free})", "kept for online"),
            Query(
                f"sum(clamp_min({free} - valve_reservation_bytes{selector}, 0))",
                "free",
            ),
        ),
    )  # fmt: skip


def _engine(share: float, histogram: str) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({histogram}_bucket{RATE})))"


def _stat(title: str, text: str, unit: Unit, expr: str, threshold: float | None = None) -> Panel:
    return Panel(title, text, Kind.STAT, unit, 4, 4, (Query(expr),), threshold)


FLEET = Board(
    "valve-fleet", "Valve / Fleet", "Every node of the cluster: does Valve keep its promises, and what does it earn?",
    (),
    (
        Row("Now", (
            _stat("Nodes", "Agents that report.", Unit.COUNT, "count(valve_agent_info)"),
            _stat("Devices", "Devices that are shared.", Unit.COUNT, "count(valve_device_memory_bytes)"),
            _stat("Online tenants", "Latency-critical engines.", Unit.COUNT,
                  'count(valve_tenant_processes{workload="online"} > 0) or vector(0)'),
            _stat("Offline tenants", "Batch engines.", Unit.COUNT,
                  'count(valve_tenant_processes{workload="offline"} > 0) or vector(0)'),
            _stat("Preemption p99", "Over all devices. The promise: below 1 ms.", Unit.SECONDS,
                  _quantile(0.99, ""), P1_S),
            _stat("Offline runs", "Share of device time in which offline may compute: what colocation earns.",
                  Unit.SHARE, f"1 - avg(rate(valve_offline_paused_seconds_total{RATE}))"),
        )),
        Row("Promises", (
            _latency(""),
            Panel("Preemptions and reclaims", "How often offline is stopped for online, and how often memory "
                  "is taken from it.", Kind.LINES, Unit.PER_SECOND, 12, 8,
                  (Query(f"sum(rate(valve_preemptions_total{RATE}))", "preemptions"),
                   Query(f"sum(rate(valve_reclaims_total{RATE}))", "reclaims"))),
            Panel("What went wrong", "Refused peers, killed processes, pauses that somebody broke or that took "
                  "too long. All should be flat at zero; each has a runbook.", Kind.LINES, Unit.PER_SECOND, 12,
                  8, tuple(Query(f"sum(rate({name}_total{RATE}))", legend) for name, legend in (
                      ("valve_rejects", "refused"), ("valve_kills", "killed"),
                      ("valve_pause_violations", "pause broken"), ("valve_pause_timeouts", "pause late")))),
            Panel("Nodes that do not follow", "Nodes whose newest settings do not hold yet, whose API server or "
                  "kubelet does not answer.", Kind.LINES, Unit.COUNT, 12, 8,
                  (Query("count(valve_settings_followed == 0) or vector(0)", "settings"),
                   Query("count(valve_apiserver_connected == 0) or vector(0)", "API server"),
                   Query("count(valve_kubelet_connected == 0) or vector(0)", "kubelet"))),
        )),
        Row("What users feel (vLLM)", (
            Panel("Time to first token", "As vLLM measures it, over all its engines that Prometheus scrapes. "
                  "Should not change when offline comes to a node.", Kind.LINES, Unit.SECONDS, 12, 8,
                  tuple(Query(_engine(q, "vllm:time_to_first_token_seconds"), f"p{q * 100:g}")
                        for q in (0.5, 0.9, 0.99)), exporter="vllm"),
            Panel("Time between tokens", "As vLLM measures it. A step up means that something shares the "
                  "device with the engine: see Preemption latency and What went wrong.", Kind.LINES,
                  Unit.SECONDS, 12, 8,
                  tuple(Query(_engine(q, "vllm:inter_token_latency_seconds"), f"p{q * 100:g}")
                        for q in (0.5, 0.9, 0.99)), exporter="vllm"),
        )),
        Row("What it earns", (
            Panel("Tokens", "Generated by online and offline engines.", Kind.LINES, Unit.TOKENS, 12, 8,
                  (Query(f"sum by (workload) (rate(valve_tenant_tokens_total{RATE}))", "{{workload}}"),)),
            _memory("{}"),
            Panel("Slowest nodes", "Preemption p99 by node, the worst first.", Kind.TABLE, Unit.SECONDS, 12, 8,
                  (Query(f"topk(10, {_quantile(0.99, '', ', node')})", "{{node}}"),), P1_S),
            Panel("Offline paused, by node", "Share of time in which offline was stopped. Near 1 for long: its "
                  "pods starve, and the operator moves them.", Kind.LINES, Unit.SHARE, 12, 8,
                  (Query(f"avg by (node) (rate(valve_offline_paused_seconds_total{RATE}))", "{{node}}"),)),
        )),
    ),
)  # fmt: skip

NODE = Board(
    "valve-node", "Valve / Node", "One node: its agent, its devices and the tenants on them.",
    (_NODE,),
    (
        Row("Agent", (
            _stat("Agent up", "Since when the agent of this node runs.", Unit.SECONDS,
                  f"min(valve_agent_uptime_seconds{{{N}}})"),
            _stat("Settings hold", "1: the newest settings are in force.", Unit.BOOL,
                  f"min(valve_settings_followed{{{N}}})"),
            _stat("API server", "1: the agent hears of changes. 0: it goes on with what it has.", Unit.BOOL,
                  f"min(valve_apiserver_connected{{{N}}})"),
            _stat("Kubelet", "1: pods' allocations are known. 0: new pods are not let in.", Unit.BOOL,
                  f"min(valve_kubelet_connected{{{N}}})"),
            _stat("Refused", "Peers refused per second.", Unit.PER_SECOND,
                  f"sum(rate(valve_rejects_total{{{N}}}{RATE}))"),
            _stat("Status writes", "Per second, to the API server; bounded by design.", Unit.PER_SECOND,
                  f"sum(rate(valve_status_writes_total{{{N}}}{RATE}))"),
        )),
        Row("Devices", (
            _latency(f"{{{N}}}"),
            Panel("Time: online busy, offline stopped", "Offline is stopped while online is busy, and a "
                  "cooldown longer. A wide gap between the two lines is cooldown: lower "
                  "compute.cooldown.factor.", Kind.LINES, Unit.SHARE, 12, 8,
                  (Query(f"rate(valve_online_busy_seconds_total{{{N}}}{RATE})", "online busy {{device}}"),
                   Query(f"rate(valve_offline_paused_seconds_total{{{N}}}{RATE})",
                         "offline stopped {{device}}"))),
            _memory(f"{{{N}}}"),
            Panel("Preemptions and reclaims", "How often offline is stopped for online, and how often memory "
                  "is taken from it.", Kind.LINES, Unit.PER_SECOND, 12, 8,
                  (Query(f"sum(rate(valve_preemptions_total{{{N}}}{RATE}))", "preemptions"),
                   Query(f"sum(rate(valve_reclaims_total{{{N}}}{RATE}))", "reclaims"))),
        )),
        Row("Tenants", (
            Panel("Memory by tenant", "Device memory that each pod holds.", Kind.LINES, Unit.BYTES, 12, 8,
                  (Query(f"valve_tenant_memory_bytes{{{N}}}", "{{tenant}}"),)),
            Panel("Tokens by tenant", "Generated per second.", Kind.LINES, Unit.TOKENS, 12, 8,
                  (Query(f"rate(valve_tenant_tokens_total{{{N}}}{RATE})", "{{tenant}}"),)),
            Panel("Tenants", "Engine processes attached, by pod. 0: the pod runs, but no engine of it has "
                  "attached.", Kind.TABLE, Unit.COUNT, 24, 6,
                  (Query(f"sum by (tenant, workload, device) (valve_tenant_processes{{{N}}})",
                         "{{tenant}} ({{workload}})"),)),
        )),
    ),
)  # fmt: skip

DEVICE = Board(
    "valve-device", "Valve / Device", "One device: who computes, who has which memory, what a preemption costs.",
    (_NODE, _DEVICE),
    (
        Row("Compute", (
            Panel("Who may compute", "Sampled at the scrape; the shares below are exact.", Kind.STATES,
                  Unit.BOOL, 24, 5,
                  (Query(f"valve_online_busy{{{D}}}", "online busy"),
                   Query(f"1 - valve_offline_paused{{{D}}}", "offline runs"))),
            _latency(f"{{{D}}}"),
            Panel("Preemption latency, all of it", "Preemptions per second by latency.", Kind.HEATMAP,
                  Unit.SECONDS, 12, 8,
                  (Query(f"sum by (le) (rate(valve_preemption_latency_seconds_bucket{{{D}}}{RATE}))",
                         "{{le}}"),)),
            Panel("Time: online busy, offline stopped", "Exact shares of time.", Kind.LINES, Unit.SHARE, 12, 8,
                  (Query(f"rate(valve_online_busy_seconds_total{{{D}}}{RATE})", "online busy"),
                   Query(f"rate(valve_offline_paused_seconds_total{{{D}}}{RATE})", "offline stopped"))),
            Panel("Preemptions", "Stops for an online request; stops for any reason (a reclaim holds offline "
                  "too).", Kind.LINES, Unit.PER_SECOND, 12, 8,
                  (Query(f"rate(valve_preemptions_total{{{D}}}{RATE})", "for a request"),
                   Query(f"rate(valve_pauses_total{{{D}}}{RATE})", "for any reason"))),
        )),
        Row("Memory", (
            _memory(f"{{{D}}}"),
            Panel("Memory by tenant", "What each holds, and what it could use. An online engine that wants more than it holds waits for a reclaim.",
                  Kind.LINES, Unit.BYTES, 12, 8,
                  (Query(f"valve_tenant_memory_bytes{{{D}}}", "{{tenant}}"),
                   Query(f"valve_tenant_memory_wanted_bytes{{{D}}}", "{{tenant}} wants"))),
            Panel("Reservation", "Free memory kept for online: grows when it was too small, shrinks after "
                  "quiet periods.", Kind.LINES, Unit.BYTES, 8, 8,
                  (Query(f"valve_reservation_bytes{{{D}}}", "reservation"),
                   Query(f"valve_device_free_bytes{{{D}}}", "free"))),
            Panel("Reclaims", "Operations per second.", Kind.LINES, Unit.PER_SECOND, 8, 8,
                  (Query(f"rate(valve_reclaims_total{{{D}}}{RATE})", "reclaims"),
                   Query(f"rate(valve_harmed_requests_total{{{D}}}{RATE})", "requests harmed"))),
            Panel("Memory reclaimed", "Bytes per second, and of them what requests owned.", Kind.LINES,
                  Unit.BYTES, 8, 8,
                  (Query(f"rate(valve_reclaimed_bytes_total{{{D}}}{RATE})", "reclaimed"),
                   Query(f"rate(valve_reclaimed_in_use_bytes_total{{{D}}}{RATE})", "in use"))),
        )),
        Row("Engines", (
            Panel("Tokens by tenant", "Generated per second.", Kind.LINES, Unit.TOKENS, 8, 8,
                  (Query(f"rate(valve_tenant_tokens_total{{{D}}}{RATE})", "{{tenant}}"),)),
            Panel("What reclaims cost", "Tokens that offline computes a second time.", Kind.LINES, Unit.TOKENS,
                  8, 8, (Query(f"sum(rate(valve_tenant_recomputed_tokens_total{{{D}}}{RATE}))",
                               "tokens recomputed"),)),
            Panel("KV blocks lost", "Blocks of offline requests lost to reclaims, per second.", Kind.LINES,
                  Unit.PER_SECOND, 8, 8,
                  (Query(f"rate(valve_tenant_lost_blocks_total{{{D},workload=\"offline\"}}{RATE})",
                         "{{tenant}}"),)),
            Panel("Requests", "Seen by the engines, per second.", Kind.LINES, Unit.PER_SECOND, 12, 8,
                  (Query(f"rate(valve_tenant_requests_total{{{D}}}{RATE})", "{{tenant}}"),)),
            Panel("Longest decode gap", "Longest recent time between two decode iterations of an online engine: "
                  "what its users feel as time per output token, and what the cooldown is made of.",
                  Kind.LINES, Unit.SECONDS, 12, 8,
                  (Query(f"valve_tenant_decode_gap_seconds{{{D}}}", "{{tenant}}"),)),
        )),
    ),
)  # fmt: skip


def _of_policy(metric: str) -> str:
    """A device's series, with the policy that holds there."""
    return f'{metric} * on (instance, device) group_left (policy) valve_agent_info{{policy=~"$policy"}}'


POLICY = Board(
    "valve-policy", "Valve / Policy", "What the settings of a policy do on its nodes. Look here before and after a change.",
    (_POLICY,),
    (
        Row("Promises", (
            _stat("Nodes", "Where it holds.", Unit.COUNT, 'count(valve_agent_info{policy=~"$policy"})'),
            _stat("Follow it", "Nodes whose newest settings are in force.", Unit.COUNT,
                  'sum(valve_settings_followed * on (instance) group_left (policy) '
                  'valve_agent_info{policy=~"$policy"})'),
            _stat("Below 1 ms", "Share of preemptions within the promise.", Unit.SHARE,
                  "sum(" + _of_policy(f'rate(valve_preemption_latency_seconds_bucket{{le="0.001"}}{RATE})')
                  + ") / sum(" + _of_policy(f"rate(valve_preemption_latency_seconds_count{RATE})") + ")"),
            _stat("Growth stopped", "Devices that reclaimed more often than maxReclaimsPerMinute.",
                  Unit.COUNT, "sum(" + _of_policy("valve_offline_growth_stopped") + ")", 0.5),
            _stat("Offline runs", "Share of device time.", Unit.SHARE,
                  "1 - avg(" + _of_policy(f"rate(valve_offline_paused_seconds_total{RATE})") + ")"),
            _stat("Reclaims", "Per minute and device.", Unit.COUNT,
                  "60 * avg(" + _of_policy(f"rate(valve_reclaims_total{RATE})") + ")"),
        )),
        Row("Compute", (
            Panel("Cooldown", "Offline stopped though online is idle: what compute.cooldown costs.",
                  Kind.LINES, Unit.SHARE, 12, 8,
                  (Query("clamp_min(avg by (policy) (" + _of_policy(
                      f"rate(valve_offline_paused_seconds_total{RATE})") + ") - avg by (policy) ("
                      + _of_policy(f"rate(valve_online_busy_seconds_total{RATE})") + "), 0)", "{{policy}}"),)),
            Panel("Preemption p99 by policy", "The promise is 1 ms.", Kind.LINES, Unit.SECONDS, 12, 8,
                  (Query("histogram_quantile(0.99, sum by (le, policy) (" + _of_policy(
                      f"rate(valve_preemption_latency_seconds_bucket{RATE})") + "))", "{{policy}}"),), P1_S),
        )),
        Row("Memory", (
            Panel("Reservation", "Of a device, between memory.reservation.min and max.", Kind.LINES,
                  Unit.SHARE, 8, 8,
                  (Query("avg by (policy) (" + _of_policy(
                      "(valve_reservation_bytes / valve_device_memory_bytes)") + ")", "average {{policy}}"),
                   Query("max by (policy) (" + _of_policy(
                       "(valve_reservation_bytes / valve_device_memory_bytes)") + ")", "largest {{policy}}"))),
            Panel("Reclaims of the busiest device", "Per minute and device; above maxReclaimsPerMinute offline stops growing.",
                  Kind.LINES, Unit.COUNT, 8, 8,
                  (Query("60 * max by (policy) (" + _of_policy(f"rate(valve_reclaims_total{RATE})") + ")",
                         "busiest device {{policy}}"),)),
            Panel("Work lost to reclaims", "Tokens recomputed, of all that offline generates.", Kind.LINES,
                  Unit.SHARE, 8, 8,
                  (Query(f"sum(rate(valve_tenant_recomputed_tokens_total{RATE})) / clamp_min(sum(rate("
                         f"valve_tenant_tokens_total{{workload=\"offline\"}}{RATE})), 1e-9)", "of tokens"),)),
        )),
    ),
)  # fmt: skip

BOARDS = (FLEET, NODE, DEVICE, POLICY)
