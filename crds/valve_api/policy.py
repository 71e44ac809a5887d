# SPDX-License-Identifier: Apache-2.0
"""ColocationPolicy, the one settings tree of Valve: what every part may do on the nodes it selects.

Cluster-scoped, short name `colo`. The agent on a machine without Kubernetes reads the
same object from a file (load.py); everything that runs reads the plain integers that
settings.py derives. Immutable values without I/O; any thread may hold them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from valve_api.meta import Condition, ObjectMeta
from valve_api.model import (
    REQUIRED,
    ApiModel,
    Count,
    Factor,
    Rule,
    bytes_between,
    setting,
    time_between,
)
from valve_api.names import DEVICE_SLABS_MAX, DEVICE_SLABS_MIN
from valve_api.quantity import Duration, Quantity, Share

LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=317)]
LabelValue = Annotated[str, StringConstraints(max_length=63)]
PriorityClassName = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Weight = Annotated[Count, Field(ge=1, le=1000)]


class Route(StrEnum):
    """How offline compute is stopped on a device."""

    AUTO = "auto"
    AGENT = "agent"
    IN_PROCESS = "in-process"
    PATCHED = "patched"
    LAUNCH_GATE = "launch-gate"


class UnknownProcesses(StrEnum):
    """What happens to a process on the device that belongs to no tenant."""

    REPORT = "Report"
    REFUSE = "Refuse"


def _both(low: str, high: str, kind: str) -> str:
    """CEL for low <= high where both are texts that `kind` (duration or quantity) reads."""
    if kind == "duration":
        return f"duration(self.{low}) <= duration(self.{high})"
    return f"quantity(string(self.{low})).compareTo(quantity(string(self.{high}))) <= 0"


def shares_ordered(low: Share, high: Share) -> bool:
    """low <= high; true where one is a percentage and the other is not: only a device can tell."""
    if low.percent is not None and high.percent is not None:
        return low.percent <= high.percent
    if low.bytes is not None and high.bytes is not None:
        return low.bytes <= high.bytes
    return True


class CpuDevice(ApiModel):
    """The embedded device of a machine without a GPU: host memory that plays device memory."""

    memory: Annotated[Quantity, bytes_between("16Mi", "16Ti")] = setting(
        REQUIRED,
        what="Memory of the embedded cpu device, which the engines' KV caches share. A multiple of slabSize.",
        why="no default fits every machine; it comes out of the machine's RAM: leave room for the engines.",
        unit="bytes",
    )


class Cooldown(ApiModel):
    """T_cool, how long the online engines must be idle before offline resumes (promise P2)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "min",
            "must not be longer than max",
            _both("min", "max", "duration"),
            lambda m: m.min <= m.max,
        ),
    )

    factor: Factor = setting(
        2.0,
        what="T_cool is this times the longest decode-iteration gap seen lately, kept within min and max.",
        why="an engine that is still decoding shows its next iteration within one gap; twice that is the "
        "published rule and leaves room for jitter.",
        unit="factor",
        ge=1.0,
        le=16.0,
    )
    min: Annotated[Duration, time_between("0s", "1m")] = setting(
        Duration("5ms"),
        what="Shortest T_cool; also used before any decode gap was seen.",
        why="below a few milliseconds a pause and a resume cost more than offline gains between them.",
        unit="time",
    )
    max: Annotated[Duration, time_between("0s", "1m")] = setting(
        Duration("500ms"),
        what="Longest T_cool.",
        why="one stall of the online engine must not idle offline for long; 500ms is twice a slow decode "
        "iteration of a large model.",
        unit="time",
    )


class Compute(ApiModel):
    """Who may compute, and how offline is stopped."""

    route: Route = setting(
        Route.AUTO,
        what="How offline compute is stopped: auto probes the device and takes the first that works of "
        "agent, patched, in-process, launch-gate. The cpu device has one way of its own: auto and agent "
        "mean the same there.",
        why="the probe knows the driver; name a route only to rule the others out.",
    )
    cooldown: Cooldown = setting(Cooldown, what="When offline resumes.")
    lease: Annotated[Duration, time_between("20ms", "1m")] = setting(
        Duration("500ms"),
        what="An offline process stops itself when the gate's heartbeat is older than this. The gate beats "
        "at least every quarter of it. Rounded down to whole milliseconds.",
        why="short enough that a dead agent harms online for half a second at most, long enough that a busy "
        "machine does not stop offline for nothing.",
        unit="time",
    )
    recovery_grace: Annotated[Duration, time_between("300ms", "5m")] = setting(
        Duration("2s"),
        what="After the agent starts, offline stays paused this long so that online engines can reconnect "
        "and say that they are busy; likewise, but for 2s at most, after a busy engine loses its connection.",
        why="runtimes retry every 100ms; 2s lets one that was descheduled or is slow to answer come first.",
        unit="time",
    )


class Reservation(ApiModel):
    """Free memory kept for online above its current use: multiplicative increase, additive decrease.

    A quantity and a percentage are compared on the node, which knows the device.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "min",
            "must not be larger than max",
            "string(self.min).endsWith('%') != string(self.max).endsWith('%') || "
            "(string(self.min).endsWith('%') ? "
            "int(string(self.min).replace('%', '')) <= int(string(self.max).replace('%', '')) : "
            + _both("min", "max", "quantity")
            + ")",
            lambda m: shares_ordered(m.min, m.max),
        ),
        Rule(
            "factor",
            "must be more than 1, or the reservation never grows",
            "self.factor > 1.0",  # not `minimum: 1.1`, which the API server cuts to 1 for a whole number
            lambda m: m.factor > 1,
        ),
        Rule(
            "decrease",
            "must be more than 0, or the reservation never shrinks",
            "string(self.decrease).endsWith('%') ? string(self.decrease) != '0%' : "
            "quantity(string(self.decrease)).isGreaterThan(quantity('0'))",
            lambda m: bool(m.decrease.bytes or m.decrease.percent),
        ),
    )

    min: Share = setting(
        Share.parse("2%"),
        what="R_min, the least that is kept free. Rounded up to whole slabs, at least one.",
        why="covers the growth of a few requests between two grants without costing offline much.",
        unit="bytes or % of device",
    )
    max: Share = setting(
        Share.parse("50%"),
        what="R_max, the most that is kept free. Rounded up to whole slabs.",
        why="choose it for the largest burst to be absorbed: beyond max every further max of demand costs "
        "one reclaim. Half of the device leaves offline the other half.",
        unit="bytes or % of device",
    )
    factor: Factor = setting(
        2.0,
        what="α: a grant to online that needed a reclaim multiplies the reservation by this (or adds the "
        "shortfall, whichever is more).",
        why="doubling bounds the reclaims of one burst by log2(burst / R_min).",
        unit="factor",
        ge=1.0,
        le=16.0,
    )
    decrease: Share = setting(
        Share.parse("1%"),
        what="β: what the reservation gives back after every quiet period. Rounded up to whole slabs.",
        why="at most (factor - 1) × min, as here, keeps the long-run rate below two reclaims per quietPeriod "
        "while online grows by less than max in it.",
        unit="bytes or % of device",
    )
    quiet_period: Annotated[Duration, time_between("10ms", "1h")] = setting(
        Duration("10s"),
        what="τ: time without a reclaim after which the reservation shrinks by one decrease.",
        why="longer than the spacing of requests within a burst, shorter than the daily swing of load.",
        unit="time",
    )


class Memory(ApiModel):
    """Who has which memory."""

    slab_size: Annotated[Quantity, bytes_between("2Mi", "1Gi", "2Mi")] = setting(
        Quantity("32Mi"),
        what="Size of a slab, the unit of grant and reclaim. One tenant can map 4096 slabs, so 32Mi serves "
        "tenants up to 128Gi.",
        why="remapping costs a call per slab, so large slabs reclaim faster; small ones harm fewer requests. "
        "32Mi keeps a GiB below 32 calls. 2Mi suits the cpu device.",
        unit="bytes",
    )
    pool: Share = setting(
        Share.parse("60%"),
        what="Memory of a GPU that Valve cuts into slabs and lends out. Rounded down to whole slabs. The cpu "
        "device has its own size, spec.cpuDevice.memory.",
        why="the rest holds what engines allocate by themselves: weights, contexts, activations, workspaces. "
        "Less for large models, more where weights are small beside the KV cache.",
        unit="bytes or % of GPU",
    )
    reservation: Reservation = setting(Reservation, what="Free memory kept for online above its current use.")
    online_floor: Share = setting(
        Share.parse("0%"),
        what="Memory that offline never holds, whether online uses it or not. Rounded up to whole slabs.",
        why="the reservation follows demand by itself; a floor is for an online engine that must never wait "
        "for a reclaim up to that size.",
        unit="bytes or % of device",
    )


class Offline(ApiModel):
    """Limits of the offline tenants."""

    default_memory: Share = setting(
        Share.parse("50%"),
        what="Device memory that an offline tenant may hold when it states no limit of its own "
        "(annotation valve.io/gpu-memory, or valve run --memory). Rounded down to whole slabs.",
        why="two tenants without limits share the device evenly.",
        unit="bytes or % of device",
    )
    max_processes: Count = setting(
        16,
        what="Offline engine processes that may be attached to one device at once; the next is refused.",
        why="the time to pause grows with the number of processes; 16 stays inside the millisecond of P1.",
        unit="count",
        ge=1,
        le=256,
    )
    starvation_delay: Annotated[Duration, time_between("1s", "24h")] = setting(
        Duration("10m"),
        what="An offline pod that stayed paused this long without a break is evicted, where another node of "
        "Valve has room for it and is not starved itself. Its disruption budget is honoured. Without "
        "Kubernetes nothing is moved.",
        why="long enough to sit out a burst, short enough that a batch job does not lose an hour.",
        unit="time",
    )
    default_weight: Weight = setting(
        100,
        what="Share of the offline GPU time of a tenant whose priority class is not in weights.",
        why="100 leaves room below and above.",
        unit="weight",
        reserved=True,
    )
    weights: dict[PriorityClassName, Weight] = setting(
        dict,
        what="Weights by the pod's priorityClassName: offline processes of one device receive GPU time in "
        "proportion.",
        why="empty: all offline tenants are equal.",
        unit="weight by name",
        max_length=64,
        reserved=True,
    )


class Guardrails(ApiModel):
    """What Valve does when a promise is at risk."""

    unknown_processes: UnknownProcesses = setting(
        UnknownProcesses.REPORT,
        what="A process that uses the device and belongs to no tenant: Report counts and logs it; Refuse "
        "also gives offline no compute while it is there, since nobody can pause it (promise P6). The cpu "
        "device has none: only tenants reach its memory.",
        why="a first installation should show what runs on its nodes before it acts on it.",
    )
    max_reclaims_per_minute: Count = setting(
        60,
        what="Beyond this many reclaims of memory in use within a minute, offline is granted no new memory "
        "until the rate has fallen.",
        why="a reclaim costs offline recomputation; one per second is the point where giving it less memory "
        "is cheaper.",
        unit="per minute",
        ge=1,
        le=60_000,
    )
    pause_timeout: Annotated[Duration, time_between("10ms", "1m")] = setting(
        Duration("1s"),
        what="An offline process whose stop is not confirmed within this time counts as one that cannot be "
        "paused and is ended (promise P6).",
        why="a stop takes microseconds; only a process stuck in the kernel takes longer than a second.",
        unit="time",
    )


class Settings(ApiModel):
    """The part of a spec that takes effect on a node: shared by policies and nodes."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "cpuDevice.memory",
            "must be a multiple of memory.slabSize",
            "!has(self.cpuDevice) || quantity(string(self.cpuDevice.memory)).asInteger() % "
            "quantity(string(self.memory.slabSize)).asInteger() == 0",
            lambda m: m.cpu_device is None or m.cpu_device.memory % m.memory.slab_size == 0,
        ),
        Rule(
            "cpuDevice.memory",
            f"must hold from {DEVICE_SLABS_MIN} to {DEVICE_SLABS_MAX} slabs of memory.slabSize",
            "!has(self.cpuDevice) || (quantity(string(self.cpuDevice.memory)).asInteger() / "
            f"quantity(string(self.memory.slabSize)).asInteger() >= {DEVICE_SLABS_MIN} && "
            "quantity(string(self.cpuDevice.memory)).asInteger() / "
            f"quantity(string(self.memory.slabSize)).asInteger() <= {DEVICE_SLABS_MAX})",
            lambda m: (
                m.cpu_device is None
                or DEVICE_SLABS_MIN <= m.cpu_device.memory // m.memory.slab_size <= DEVICE_SLABS_MAX
            ),
        ),
    )

    cpu_device: CpuDevice | None = setting(
        None,
        what="The embedded device for machines without a GPU (valve agent --device cpu).",
        why="GPU nodes have devices of their own.",
    )
    compute: Compute = setting(Compute, what="Who may compute, and how offline is stopped.")
    memory: Memory = setting(Memory, what="Who has which memory.")
    offline: Offline = setting(Offline, what="Limits of the offline tenants.")
    guardrails: Guardrails = setting(Guardrails, what="What Valve does when a promise is at risk.")


class PolicySpec(Settings):
    """Nodes, and what holds on them."""

    node_selector: dict[LabelKey, LabelValue] = setting(
        dict,
        what="Labels a node must have, all of them, for this policy to hold on it.",
        why="empty selects every node; priority says who wins where two policies select the same node.",
        unit="labels",
        max_length=32,
    )
    priority: Count = setting(
        0,
        what="Where several policies select a node, the one with the highest priority holds on it; among "
        "equals the oldest, then the first by name. The others say so in their condition Overlapping.",
        why="with 0 everywhere a new policy takes no node away from an old one.",
        unit="count",
        ge=-1000,
        le=1000,
    )


class PolicyStatus(ApiModel):
    """What the operator made of the policy.

    Conditions: Accepted (the spec can take effect), Ready (it has, on every node), Overlapping (another
    policy holds on nodes that it selects), Starving (offline pods that nobody can move), Degraded (a promise
    is at risk on a node).
    """

    observed_generation: int = setting(0, what="metadata.generation that this status speaks of.", ge=0)
    conditions: list[Condition] = setting(
        list, what="Accepted, Ready, Overlapping, Starving, Degraded.", list_key="type", max_length=16
    )
    nodes: int = setting(0, what="Nodes that the policy holds on.", unit="count", ge=0)
    ready_nodes: int = setting(0, what="Of them, nodes whose agent follows the policy.", unit="count", ge=0)
    gpus: int = setting(0, what="GPUs of those nodes.", unit="count", ge=0)
    worst_p99_us: int = setting(0, what="Largest preemptLatency.p99Us of those GPUs.", unit="µs", ge=0)
    preemptions: int = setting(
        0,
        what="Times offline was stopped for online, as the agents count since they started.",
        unit="count",
        ge=0,
    )
    reclaims: int = setting(
        0, what="Times memory in use was taken from offline, counted likewise.", unit="count", ge=0
    )


class ColocationPolicy(ApiModel):
    """What Valve may do on the nodes that it selects."""

    api_version: Literal["valve.io/v1alpha1"]
    kind: Literal["ColocationPolicy"]
    metadata: ObjectMeta
    spec: PolicySpec = setting(PolicySpec, what="Nodes, and what holds on them.")
    status: PolicyStatus | None = setting(None, what="Written by the operator.")
