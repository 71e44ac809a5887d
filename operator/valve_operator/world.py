# SPDX-License-Identifier: Apache-2.0
"""What the operator knows of the cluster: small views of the objects, and the `World` that holds them.

A view keeps only what reconcile reads (a Node of 10 KB becomes ~300 bytes), so that a thousand nodes fit.
Views are immutable values. The World is changed by watch.py and census.py, and read by reconcile, all in one
thread: the event loop's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from valve_operator.starvation import PausedSince

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NodeView:
    """A Node."""

    name: str
    uid: str
    labels: Mapping[str, str]
    ready: bool
    schedulable: bool
    """not cordoned"""
    offline_gib: int
    """allocatable offline memory, in GiB"""


@dataclass(frozen=True, slots=True)
class PolicyView:
    """A ColocationPolicy. `settings` is what its nodes get; None where the policy is refused."""

    name: str
    uid: str
    generation: int
    created: str
    """creationTimestamp: RFC 3339 in UTC, so it sorts as text"""
    priority: int
    selector: Mapping[str, str]
    settings: Json | None
    starvation_delay_s: float
    problem: str
    """why it is refused; "" where it is not"""
    status: Json
    """as last written, by whichever replica"""


@dataclass(frozen=True, slots=True)
class TenantView:
    """An offline tenant that its agent has paused."""

    gpu: str
    pod: str
    """namespace/name"""


@dataclass(frozen=True, slots=True)
class ReportView:
    """What a node's agent says of itself, summed over its GPUs."""

    observed_generation: int = 0
    ready: bool = False
    why: str = "no agent has reported yet"
    degraded: str = ""
    """the sentence of a promise at risk; "" where there is none"""
    gpus: int = 0
    worst_p99_us: int = 0
    preemptions: int = 0
    reclaims: int = 0
    reported_at: datetime | None = None

    @property
    def says(self) -> tuple[int, bool, str, str]:
        """All but the figures, which change with every report."""
        return (self.observed_generation, self.ready, self.why, self.degraded)


@dataclass(frozen=True, slots=True)
class ColonodeView:
    """A ColocationNode."""

    name: str
    uid: str
    generation: int
    owner_uid: str
    """uid of the Node that owns it; "" where none does"""
    spec: Json
    report: ReportView


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod that admission marked as offline, and that has not ended."""

    namespace: str
    name: str
    uid: str
    node: str
    """"" while it is not scheduled"""
    memory_gib: int
    controller: str
    """kind of its controller, which makes it again after an eviction; "" where it has none"""
    node_selector: Mapping[str, str]
    leaving: bool
    """has a deletionTimestamp"""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class DaemonSetView:
    """A DaemonSet that this operator made."""

    name: str
    uid: str
    digest: str
    """of the manifest that was applied"""


STARVATION_DELAY_S: Final = 600.0
"""Of a policy that is refused: its nodes keep their settings, so this is never used for a decision."""


@dataclass(slots=True)
class World:
    """Everything, by name (pods: by namespace/name)."""

    nodes: dict[str, NodeView] = field(default_factory=dict)
    policies: dict[str, PolicyView] = field(default_factory=dict)
    colonodes: dict[str, ColonodeView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    daemonsets: dict[str, DaemonSetView] = field(default_factory=dict)
    templates: tuple[Json, ...] = ()
    """manifests of the DaemonSets, complete but for the digest (daemonsets.py)"""
    paused: PausedSince = field(default_factory=PausedSince)
