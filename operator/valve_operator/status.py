# SPDX-License-Identifier: Apache-2.0
"""A policy's status: figures of its nodes summed up, conditions, and the events that go with a change.

Pure; called by reconcile. An event belongs to a condition that changed its status or reason, so the same
state is never told twice, however often reconcile runs and whichever replica runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from valve_operator.actions import EventNote, WriteStatus
from valve_operator.world import ColonodeView, Json, NodeView, PolicyView, World

NAMED_MAX: Final = 3
"""Nodes or pods that a message names; of more it gives the number."""
SILENT_AFTER: Final = timedelta(seconds=90)
"""An agent that reported nothing for so long is not ready, whatever it said last."""
GOOD: Final = {
    "Accepted": "True",
    "Ready": "True",
    "Overlapping": "False",
    "Starving": "False",
    "Degraded": "False",
}


def lag_of(node: NodeView, colonode: ColonodeView | None, generation: int, now: datetime) -> str:
    """Why a node does not follow its policy of that generation; "" where it does."""
    if colonode is None:
        return "has no settings yet"
    report = colonode.report
    if not node.ready:
        return "the node is not ready"
    if not report.ready:
        return report.why
    if report.reported_at is not None and now - report.reported_at > SILENT_AFTER:
        return f"its agent has been silent since {_text(report.reported_at)}; look at its pod on the node"
    written = (colonode.spec.get("policy") or {}).get("generation")
    if written != generation or report.observed_generation != colonode.generation:
        return "its agent has not taken over the newest settings yet"
    return ""


def status_of(
    world: World,
    policy: PolicyView,
    nodes: Sequence[str],
    lost: Mapping[str, int],
    staying: Sequence[str],
    now: datetime,
) -> WriteStatus | None:
    """The status to write; None where it is as it should be.

    nodes: names of those that the policy holds on. lost: policy that holds instead → number of nodes.
    staying: sentences on starved pods that nobody can move.
    """
    lags = {n: lag_of(world.nodes[n], world.colonodes.get(n), policy.generation, now) for n in nodes}
    late = [f"{name}: {lag}" for name, lag in lags.items() if lag]
    reports = {n: world.colonodes[n].report for n in nodes if n in world.colonodes}
    degraded = [f"{name}: {report.degraded}" for name, report in reports.items() if report.degraded]
    conditions = [
        _accepted(policy),
        _ready(policy, len(nodes), late),
        _overlapping(lost),
        ("Starving", "True", "CannotMove", _some(staying, "offline pods stay paused"))
        if staying
        else ("Starving", "False", "None", "no offline pod waits for longer than offline.starvationDelay"),
        ("Degraded", "True", "PromiseAtRisk", _some(degraded, "nodes"))
        if degraded
        else ("Degraded", "False", "None", "no agent reports a promise at risk"),
    ]
    known = {c["type"]: c for c in policy.status.get("conditions") or ()}
    written = [_condition(*c, policy.generation, known.get(c[0]), now) for c in conditions]
    status: Json = {
        "observedGeneration": policy.generation,
        "conditions": written,
        "nodes": len(nodes),
        "readyNodes": len(nodes) - len(late),
        "gpus": sum(report.gpus for report in reports.values()),
        "worstP99Us": max((report.worst_p99_us for report in reports.values()), default=0),
        "preemptions": sum(report.preemptions for report in reports.values()),
        "reclaims": sum(report.reclaims for report in reports.values()),
    }
    if status == policy.status:
        return None
    changed = [c for c in written if _differs(known.get(c["type"]), c)]
    counted = ("observedGeneration", "nodes")
    urgent = bool(changed) or any(status[name] != policy.status.get(name) for name in counted)
    # A new policy whose conditions are all as they should be is not worth an event for each.
    events = tuple(_event(c) for c in changed if c["type"] in known or c["status"] != GOOD[c["type"]])
    return WriteStatus(policy.name, policy.uid, status, urgent, events)


def _accepted(policy: PolicyView) -> tuple[str, str, str, str]:
    if policy.problem:
        text = f"{policy.problem}; its nodes keep the settings they have"
        return ("Accepted", "False", "Refused", text)
    return ("Accepted", "True", "Valid", "the settings can take effect")


def _ready(policy: PolicyView, nodes: int, late: Sequence[str]) -> tuple[str, str, str, str]:
    if policy.problem:
        return ("Ready", "False", "Refused", "the policy is refused; see the condition Accepted")
    if not nodes:
        wanted = ", ".join(f"{k}={v}" for k, v in sorted(policy.selector.items())) or "any label"
        return ("Ready", "False", "NoNodes", f"it holds on no node; spec.nodeSelector wants {wanted}")
    if late:
        return (
            "Ready",
            "False",
            "Progressing",
            f"{nodes - len(late)} of {nodes} nodes follow; {_some(late)}",
        )
    return ("Ready", "True", "AllNodesFollow", f"all {nodes} nodes follow the policy")


def _overlapping(lost: Mapping[str, int]) -> tuple[str, str, str, str]:
    if not lost:
        return ("Overlapping", "False", "None", "no other policy holds on a node that this one selects")
    by = ", ".join(f"{name} on {count}" for name, count in sorted(lost.items()))
    text = (
        f"other policies hold on nodes that this one selects: {by}; the higher spec.priority wins, then the "
        "older policy, then the first name"
    )
    return ("Overlapping", "True", "OtherPolicyHolds", text)


def _condition(
    kind: str, truth: str, reason: str, message: str, generation: int, known: Json | None, now: datetime
) -> Json:
    same = known is not None and known.get("status") == truth
    since = known["lastTransitionTime"] if known and same and known.get("lastTransitionTime") else _text(now)
    return {
        "type": kind,
        "status": truth,
        "reason": reason,
        "message": message[:4096],
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }


def _differs(known: Json | None, condition: Json) -> bool:
    return known is None or any(known.get(name) != condition[name] for name in ("status", "reason"))


def _event(condition: Json) -> EventNote:
    good = condition["status"] == GOOD[condition["type"]]
    reason = condition["type"] if condition["status"] == "True" else f"Not{condition['type']}"
    return EventNote("Normal" if good else "Warning", reason, condition["message"][:1024])


def _some(sentences: Sequence[str], of: str = "") -> str:
    rest = len(sentences) - NAMED_MAX
    text = "; ".join(sentences[:NAMED_MAX])
    return f"{text}; and {rest} more {of}".rstrip() if rest > 0 else text


def _text(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
