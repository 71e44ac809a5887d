# SPDX-License-Identifier: Apache-2.0
"""A cluster in a dict: objects as the API server would send them, and actions done to them.

It knows what the operator relies on and no more: server-side apply of our fields, owners, evictions.
Everything goes through the views, so their reading is tested too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from valve_operator import daemonsets, views
from valve_operator.actions import (
    Action,
    DeleteDaemonSet,
    DeleteNode,
    Evict,
    LabelNode,
    WriteDaemonSet,
    WriteNode,
    WriteStatus,
)
from valve_operator.reconcile import reconcile
from valve_operator.world import World

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def template(name: str) -> Json:
    pod = {"containers": [{"name": name, "image": name}], "nodeSelector": {"kubernetes.io/os": "linux"}}
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


TEMPLATES = tuple(
    daemonsets.manifest(template(name), "valve-system", "valve-node", "u-owner")
    for name in ("valve-agent", "valve-device-plugin")
)


@dataclass
class Cluster:
    """The objects, by name."""

    nodes: dict[str, Json] = field(default_factory=dict)
    policies: dict[str, Json] = field(default_factory=dict)
    colonodes: dict[str, Json] = field(default_factory=dict)
    pods: dict[str, Json] = field(default_factory=dict)
    daemonsets: dict[str, Json] = field(default_factory=dict)
    evicted: list[str] = field(default_factory=list)
    now: datetime = NOW
    now_s: float = 1000.0
    uids: int = 0
    paused: Any = None

    def _uid(self) -> str:
        self.uids += 1
        return f"u{self.uids}"

    def add_node(self, name: str, gib: int = 64, **labels: str) -> None:
        self.nodes[name] = {
            "metadata": {"name": name, "uid": self._uid(), "labels": labels},
            "spec": {},
            "status": {
                "conditions": [{"type": "Ready", "status": "True"}],
                "allocatable": {"cpu": "8", "valve.io/offline-memory-gib": str(gib)},
            },
        }

    def add_policy(self, name: str, created: int = 0, **spec: Any) -> None:
        self.policies[name] = {
            "apiVersion": "valve.io/v1alpha1",
            "kind": "ColocationPolicy",
            "metadata": {
                "name": name,
                "uid": self._uid(),
                "generation": 1,
                "creationTimestamp": f"2026-01-01T00:00:{created:02}Z",
                "managedFields": [{"manager": "kubectl"}],
            },
            "spec": spec,
        }

    def change_policy(self, name: str, **spec: Any) -> None:
        self.policies[name]["spec"] |= spec
        self.policies[name]["metadata"]["generation"] += 1

    def add_pod(self, name: str, node: str, gib: int = 8, controller: str = "Job") -> None:
        owners = [{"kind": controller, "name": "j", "uid": "o", "controller": True}] if controller else []
        resources = {"requests": {"valve.io/offline-memory-gib": str(gib)}}
        self.pods[f"batch/{name}"] = {
            "metadata": {
                "namespace": "batch",
                "name": name,
                "uid": self._uid(),
                "labels": {"valve.io/workload": "offline"},
                "annotations": {"valve.io/workload": "offline"},
                "ownerReferences": owners,
            },
            "spec": {"nodeName": node, "containers": [{"name": "c", "resources": resources}]},
            "status": {"phase": "Running"},
        }

    def report(
        self, name: str, *, preemptions: int = 0, paused: tuple[str, ...] = (), ready: bool = True
    ) -> None:
        """The node's agent follows the newest spec and says this."""
        tenants = [{"name": pod, "workload": "offline", "busy": False} for pod in paused]
        node = self.colonodes[name]
        node["status"] = {
            "observedGeneration": node["metadata"]["generation"],
            "conditions": [{"type": "Ready", "status": str(ready), "message": "the driver is missing"}],
            "gpus": [
                {
                    "id": "GPU-1",
                    "paused": bool(paused),
                    "preemptions": preemptions,
                    "reclaims": 1,
                    "preemptLatency": {"p99Us": 400},
                    "tenants": tenants,
                }
            ],
        }

    def world(self) -> World:
        """As a new replica would read it; it keeps only what it has seen of pauses."""
        world = World(templates=TEMPLATES)
        if self.paused is not None:
            world.paused = self.paused
        self.paused = world.paused
        for name, raw in self.nodes.items():
            if view := views.node_view(raw):
                world.nodes[name] = view
        for name, raw in self.policies.items():
            if policy := views.policy_view(raw):
                world.policies[name] = policy
        for name, raw in self.colonodes.items():
            world.colonodes[name] = views.colonode_view(raw)
            world.paused.observe(name, raw.get("status") or {}, self.now_s)
        for name, raw in self.pods.items():
            if pod := views.pod_view(raw):
                world.pods[name] = pod
        for name, raw in self.daemonsets.items():
            world.daemonsets[name] = views.daemonset_view(raw)
        return world

    def missing(self) -> list[Action]:
        return reconcile(self.world(), self.now, self.now_s)

    def do(self, action: Action) -> None:
        """What the API server makes of it."""
        match action:
            case WriteNode(name, spec, owner):
                there = self.colonodes.setdefault(
                    name, {"metadata": {"name": name, "uid": self._uid(), "generation": 0}, "spec": None}
                )
                there["metadata"]["ownerReferences"] = [{"kind": "Node", "name": name, "uid": owner}]
                if there["spec"] != spec:
                    there["spec"] = copy.deepcopy(spec)
                    there["metadata"]["generation"] += 1
            case DeleteNode(name, uid):
                assert self.colonodes.pop(name)["metadata"]["uid"] == uid
            case LabelNode(name, uid, labels):
                assert self.nodes[name]["metadata"]["uid"] == uid
                kept = {
                    k: v for k, v in self.nodes[name]["metadata"]["labels"].items() if "valve.io/" not in k
                }
                self.nodes[name]["metadata"]["labels"] = {**kept, **labels}
            case WriteDaemonSet(name, manifest):
                made = copy.deepcopy(manifest)
                made["metadata"]["uid"] = self._uid()
                self.daemonsets[name] = made
            case DeleteDaemonSet(name, _):
                del self.daemonsets[name]
            case WriteStatus(name, _, status):
                self.policies[name]["status"] = copy.deepcopy(status)
            case Evict(namespace, name, _):
                self.evicted.append(f"{namespace}/{name}")
                del self.pods[f"{namespace}/{name}"]

    def settle(self, rounds: int = 10) -> int:
        """Does everything until nothing is missing; the number of rounds."""
        for done in range(rounds):
            actions = self.missing()
            if not actions:
                return done
            for action in actions:
                self.do(action)
        raise AssertionError(f"still missing after {rounds} rounds: {self.missing()}")

    def condition(self, policy: str, kind: str) -> Json:
        found: Json = next(c for c in self.policies[policy]["status"]["conditions"] if c["type"] == kind)
        return found
