# SPDX-License-Identifier: Apache-2.0
"""From what the API server sends to the views of world.py. Pure; called for every event and every list entry.

Objects come from the API server, so Kubernetes' own fields have the types it promises. What users and agents
write is read as the models read it, or tolerantly where an agent of another version may have written it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from valve_api.errors import PolicyError
from valve_api.load import policy_from
from valve_api.names import ANNOTATION_WORKLOAD, LABEL_WORKLOAD, RESOURCE_OFFLINE_MEMORY, Workload
from valve_api.policy import ColocationPolicy
from valve_api.quantity import parse_quantity
from valve_operator.world import (
    STARVATION_DELAY_S,
    ColonodeView,
    DaemonSetView,
    Json,
    NodeView,
    PodView,
    PolicyView,
    ReportView,
)

ANNOTATION_DIGEST = "operator.valve.io/template-digest"
"""On a DaemonSet of ours: sha256 of the manifest as it was applied."""

Raw = Mapping[str, Any]


def node_view(raw: Raw) -> NodeView | None:
    """A Node; None while it is being deleted."""
    meta = raw["metadata"]
    if meta.get("deletionTimestamp"):
        return None
    status = raw.get("status") or {}
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
    return NodeView(
        name=meta["name"],
        uid=meta["uid"],
        labels=dict(meta.get("labels") or {}),
        ready=conditions.get("Ready") == "True",
        schedulable=not (raw.get("spec") or {}).get("unschedulable"),
        offline_gib=_whole((status.get("allocatable") or {}).get(RESOURCE_OFFLINE_MEMORY)),
    )


def policy_view(raw: Raw) -> PolicyView | None:
    """A ColocationPolicy; None while it is being deleted: it holds nowhere any more."""
    meta = raw["metadata"]
    if meta.get("deletionTimestamp"):
        return None
    spec = raw.get("spec") or {}
    settings: Json | None = None
    problem = ""
    delay_s = STARVATION_DELAY_S
    try:
        # Only what the policy says of itself: metadata may hold fields newer than the model, status is ours.
        policy = policy_from(
            {
                "apiVersion": raw.get("apiVersion"),
                "kind": raw.get("kind"),
                "metadata": {"name": meta["name"]},
                "spec": spec,
            },
            f"policy {meta['name']}",
        )
    except PolicyError as error:
        problem = str(error)
    else:
        settings = settings_of(policy)
        delay_s = int(policy.spec.offline.starvation_delay) / 1e9
    selector = spec.get("nodeSelector")
    priority = spec.get("priority")
    return PolicyView(
        name=meta["name"],
        uid=meta["uid"],
        generation=int(meta.get("generation") or 0),
        created=str(meta.get("creationTimestamp") or ""),
        priority=priority if isinstance(priority, int) else 0,
        selector={str(k): str(v) for k, v in selector.items()} if isinstance(selector, Mapping) else {},
        settings=settings,
        starvation_delay_s=delay_s,
        problem=problem,
        status=dict(raw.get("status") or {}),
    )


def settings_of(policy: ColocationPolicy) -> Json:
    """The part of a policy that takes effect on a node, every default written out."""
    own = {"node_selector", "priority"}
    return policy.spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=own)


def colonode_view(raw: Raw) -> ColonodeView:
    """A ColocationNode, its status summed up."""
    meta = raw["metadata"]
    owners = meta.get("ownerReferences") or ()
    return ColonodeView(
        name=meta["name"],
        uid=meta["uid"],
        generation=int(meta.get("generation") or 0),
        owner_uid=next((o["uid"] for o in owners if o.get("kind") == "Node"), ""),
        spec=dict(raw.get("spec") or {}),
        report=report_view(raw.get("status") or {}),
    )


def report_view(status: Raw) -> ReportView:
    """A ColocationNode's status in a few numbers."""
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    ready, degraded = conditions.get("Ready"), conditions.get("Degraded")
    why = "no agent has reported yet" if ready is None else _said(ready)
    gpus = status.get("gpus") or ()
    return ReportView(
        observed_generation=int(status.get("observedGeneration") or 0),
        ready=ready is not None and ready["status"] == "True",
        why=why,
        degraded=_said(degraded) if degraded and degraded["status"] == "True" else "",
        gpus=len(gpus),
        worst_p99_us=max((int((g.get("preemptLatency") or {}).get("p99Us") or 0) for g in gpus), default=0),
        preemptions=sum(int(g.get("preemptions") or 0) for g in gpus),
        reclaims=sum(int(g.get("reclaims") or 0) for g in gpus),
        reported_at=_time(status.get("reportedAt")),
    )


def pod_view(raw: Raw) -> PodView | None:
    """An offline pod that has not ended; None for every other."""
    meta = raw["metadata"]
    said = {**(meta.get("labels") or {}), **(meta.get("annotations") or {})}
    if said.get(ANNOTATION_WORKLOAD) != Workload.OFFLINE or LABEL_WORKLOAD not in (meta.get("labels") or {}):
        return None
    if (raw.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return None
    spec = raw.get("spec") or {}
    requests = [(c.get("resources") or {}).get("requests") or {} for c in spec.get("containers") or ()]
    controller = next((o["kind"] for o in meta.get("ownerReferences") or () if o.get("controller")), "")
    return PodView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        node=spec.get("nodeName") or "",
        memory_gib=sum(_whole(request.get(RESOURCE_OFFLINE_MEMORY)) for request in requests),
        controller=controller,
        node_selector=dict(spec.get("nodeSelector") or {}),
        leaving=bool(meta.get("deletionTimestamp")),
    )


def daemonset_view(raw: Raw) -> DaemonSetView:
    """A DaemonSet of ours."""
    meta = raw["metadata"]
    return DaemonSetView(
        meta["name"], meta["uid"], (meta.get("annotations") or {}).get(ANNOTATION_DIGEST, "")
    )


def _said(condition: Raw) -> str:
    return str(condition.get("message") or condition.get("reason") or condition["status"])


def _whole(value: object) -> int:
    """An extended resource's amount: a whole number, which may be written as 1k, 1Ki or 12e3."""
    return parse_quantity(str(value or 0))


def _time(value: object) -> datetime | None:
    return datetime.fromisoformat(value) if isinstance(value, str) and value else None
