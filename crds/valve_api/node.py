# SPDX-License-Identifier: Apache-2.0
"""ColocationNode, one per node: what holds there (spec) and what its agent measures (status).

The operator writes the spec from the policy that selects the node; the agent writes the
status, at most every few seconds. Cluster-scoped, named like the node. Immutable values.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, StringConstraints

from valve_api.meta import Condition, ObjectMeta
from valve_api.model import REQUIRED, ApiModel, setting
from valve_api.names import Workload
from valve_api.policy import Route, Settings
from valve_api.quantity import Quantity

Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Text = Annotated[str, StringConstraints(max_length=1024)]

GPUS_MAX = 64
TENANTS_MAX = 64


class PolicyReference(ApiModel):
    """The policy that the settings come from."""

    name: Name = setting(REQUIRED, what="Name of the ColocationPolicy.", unit="name")
    generation: int = setting(0, what="Its metadata.generation when the settings were written.", ge=0)


class NodeSpec(Settings):
    """Effective settings: the policy's, every default written out."""

    policy: PolicyReference = setting(REQUIRED, what="The policy that the settings come from.")


class TenantStatus(ApiModel):
    """A tenant of one GPU."""

    name: Name = setting(REQUIRED, what="namespace/pod, or the launcher's name.", unit="name")
    workload: Workload = setting(REQUIRED, what="online or offline.")
    processes: int = setting(0, what="Engine processes attached.", unit="count", ge=0)
    memory: Quantity = setting(Quantity(0), what="Device memory it holds.", unit="bytes")
    limit: Quantity = setting(Quantity(0), what="Most device memory it may hold.", unit="bytes")
    busy: bool = setting(False, what="Online: a request is in it. Offline: it may compute.")


class PreemptLatency(ApiModel):
    """From an online engine turning busy to no offline work running, over the last 1,000 preemptions."""

    p50_us: int = setting(0, what="Median.", unit="µs", ge=0)
    p99_us: int = setting(0, what="99th percentile.", unit="µs", ge=0)
    max_us: int = setting(0, what="Largest.", unit="µs", ge=0)
    samples: int = setting(0, what="Preemptions it is taken from; 0: no figure yet.", unit="count", ge=0)


class GpuStatus(ApiModel):
    """One GPU as its agent sees it. Counters start at 0 when the agent starts."""

    id: Name = setting(REQUIRED, what="UUID, or cpu for the embedded device.", unit="name")
    model: Text = setting("", what="Product name.", unit="name")
    memory: Quantity = setting(Quantity(0), what="Memory that Valve shares out.", unit="bytes")
    free: Quantity = setting(Quantity(0), what="Memory that nobody holds.", unit="bytes")
    reservation: Quantity = setting(Quantity(0), what="Free memory now kept for online.", unit="bytes")
    route: Route = setting(Route.AUTO, what="How offline compute is stopped; auto: the probe has not ended.")
    route_reason: Text = setting("", what="Why not a stronger route.")
    paused: bool = setting(False, what="Offline is stopped.")
    paused_reason: Text = setting("", what="busy, cooldown, hold, recovering; empty when it runs.")
    tenants: list[TenantStatus] = setting(
        list, what="Who shares the GPU.", list_key="name", max_length=TENANTS_MAX
    )
    preempt_latency: PreemptLatency = setting(PreemptLatency, what="How fast offline stops.")
    preemptions: int = setting(0, what="Times offline was stopped for online.", unit="count", ge=0)
    reclaims: int = setting(0, what="Times memory in use was taken from offline.", unit="count", ge=0)
    reclaimed: Quantity = setting(Quantity(0), what="Memory in use taken from offline.", unit="bytes")
    unknown_processes: int = setting(0, what="Processes on it that belong to no tenant.", unit="count", ge=0)


class NodeStatus(ApiModel):
    """What the agent measures.

    Conditions: Ready (the agent follows spec), Degraded (a promise is at risk).
    """

    observed_generation: int = setting(0, what="metadata.generation that this status speaks of.", ge=0)
    conditions: list[Condition] = setting(list, what="Ready, Degraded.", list_key="type", max_length=16)
    reported_at: AwareDatetime | None = setting(
        None,
        what="When the agent wrote this status. It writes at least every 30s; after 90s the operator calls "
        "it silent and the node no longer ready.",
        unit="time",
    )
    agent_version: Text = setting("", what="Version of the agent.")
    gpus: list[GpuStatus] = setting(list, what="One entry per GPU.", list_key="id", max_length=GPUS_MAX)
    gpu_count: int = setting(0, what="Length of gpus, for kubectl get.", unit="count", ge=0)
    online_tenants: int = setting(0, what="Online tenants of all GPUs.", unit="count", ge=0)
    offline_tenants: int = setting(0, what="Offline tenants of all GPUs.", unit="count", ge=0)
    worst_p99_us: int = setting(0, what="Largest preemptLatency.p99Us of all GPUs.", unit="µs", ge=0)


class ColocationNode(ApiModel):
    """What Valve does on one node."""

    api_version: Literal["valve.io/v1alpha1"]
    kind: Literal["ColocationNode"]
    metadata: ObjectMeta
    spec: NodeSpec = setting(REQUIRED, what="Effective settings, written by the operator.")
    status: NodeStatus | None = setting(None, what="Measured, written by the agent.")
