# SPDX-License-Identifier: Apache-2.0
"""Why is this pod paused, pending or refused: the answer in sentences, from objects of the API server.

Why it exists: the facts lie in five places (the pod, its events, the node's ColocationNode, the scheduler's
message, the agent's report) and each speaks its own language.

Pure: `explain` takes objects and returns sentences; the first says what is, the others why, and `advice` what
to do. Threading model: none. Callers: explain_main.py, tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from valve_api.errors import UnitError
from valve_api.names import (
    ANNOTATION_WORKLOAD,
    RESOURCE_OFFLINE_MEMORY,
    RESOURCE_ONLINE_GPU,
    RESOURCES,
    Workload,
)
from valve_api.quantity import Quantity, format_quantity
from valve_cli.cluster import name_of, offline_gib, workload_of

SILENT_S = 90.0
"""An agent that has not written its status for so long is not heard."""
REFUSED_EXIT = 78
"""libvalve's exit status for an offline process that the agent refuses."""
GIB = 1 << 30
_PAUSED = {
    "cooldown": "no online request is left, but offline waits for the cooldown (twice the longest recent "
    "decode gap) so that it is not stopped again at once",
    "hold": "memory is being taken back for online just now",
    "recovering": "the agent has just started and lets online engines reconnect first "
    "(compute.recoveryGrace)",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    pod: str
    state: str
    """One word: foreign, missing, refused, pending, starting, failed, done, waiting, paused, running, busy,
    idle, unknown."""
    sentences: tuple[str, ...]
    advice: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"schema": "valve.io/explain/v1", **asdict(self)}


def explain(
    pod: Mapping[str, Any],
    nodes: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    now: datetime,
) -> Explanation:
    """`nodes`: all ColocationNodes. `events`: of the pod."""
    name, workload = name_of(pod), workload_of(pod)
    if workload is None:
        return _foreign(name)
    if workload not in list(Workload):
        return Explanation(
            name, "refused", (f"{name} says {ANNOTATION_WORKLOAD}: {workload}, which is neither online nor "
            "offline.",), (f"Write {ANNOTATION_WORKLOAD}: online or offline in its template.",),
        )  # fmt: skip
    if not _has_resource(pod):
        return Explanation(
            name, "refused",
            (f"{name} is annotated as {workload}, but admission gave it no {_resource(workload)}: it was "
             "made before Valve was installed, or past its webhook.",),
            ("Delete the pod; its controller makes it again, and admission sees it.",),
        )  # fmt: skip
    phase = pod.get("status", {}).get("phase", "Pending")
    if phase in ("Failed", "Succeeded"):
        return _ended(pod, name, phase)
    if not pod["spec"].get("nodeName"):
        return _pending(pod, name, workload, nodes)
    node = next((one for one in nodes if one["metadata"]["name"] == pod["spec"]["nodeName"]), None)
    waiting = _not_running(pod, name, events)
    if waiting is not None:
        return waiting
    return _running(name, workload, pod["spec"]["nodeName"], node, now)


def explain_missing(name: str, events: Iterable[Mapping[str, Any]]) -> Explanation:
    """There is no such pod. `events`: of its namespace."""
    wanted = name.partition("/")[2]
    refusals = []
    for event in events:
        owner = event.get("involvedObject", {}).get("name", "")
        if event.get("reason") == "FailedCreate" and owner and wanted.startswith(owner):
            refusals.append(
                f"{event['involvedObject'].get('kind')} {owner} could not make it: {event['message']}"
            )
    if refusals:
        return Explanation(name, "refused", (f"There is no pod {name}.", refusals[-1]))
    return Explanation(
        name, "missing", (f"There is no pod {name}, and nothing says that somebody tried to make it.",),
        ("Check name and namespace (-n): `kubectl get pods -A`.",),
    )  # fmt: skip


def _foreign(name: str) -> Explanation:
    return Explanation(
        name, "foreign", (f"{name} is not annotated: Valve neither protects nor pauses it.",),
        (f"To have it served, put {ANNOTATION_WORKLOAD}: online or offline into its template.",),
    )  # fmt: skip


def _resource(workload: str) -> str:
    return RESOURCE_ONLINE_GPU if workload == "online" else RESOURCE_OFFLINE_MEMORY


def _has_resource(pod: Mapping[str, Any]) -> bool:
    return any(
        kind in ((container.get("resources") or {}).get("limits") or {})
        for container in pod["spec"].get("containers", [])
        for kind in RESOURCES
    )


def _ended(pod: Mapping[str, Any], name: str, phase: str) -> Explanation:
    status = pod["status"]
    if phase == "Succeeded":
        return Explanation(name, "done", (f"{name} has ended well.",))
    why = status.get("message") or status.get("reason") or "its container ended with an error"
    sentences = [f"{name} has failed: {why}"]
    advice = []
    for condition in status.get("conditions") or []:
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            sentences.append(f"It was disrupted: {condition.get('message') or condition.get('reason')}.")
    if _exit_code(pod) == REFUSED_EXIT:
        sentences.append("libvalve ended it, because the agent refuses this offline process.")
        advice.append(f"Its log says why: kubectl logs -n {name.replace('/', ' ')}")
    return Explanation(name, "failed", tuple(sentences), tuple(advice))


def _pending(
    pod: Mapping[str, Any], name: str, workload: str, nodes: Sequence[Mapping[str, Any]]
) -> Explanation:
    gib = offline_gib(pod)
    asks = "a seat for an online engine" if workload == "online" else f"{gib} GiB of offline memory"
    sentences = [f"{name} is pending: it asks for {asks}, and no node has been found for it."]
    advice = []
    for condition in pod.get("status", {}).get("conditions") or []:
        if (
            condition["type"] == "PodScheduled"
            and condition["status"] == "False"
            and condition.get("message")
        ):
            sentences.append(f"The scheduler says: {condition['message']}")
    if not nodes:
        sentences.append("No node is under a ColocationPolicy.")
        advice.append("Apply a ColocationPolicy whose nodeSelector matches your GPU nodes.")
    elif workload == "offline":
        lends = sorted(((lendable_gib(node), node["metadata"]["name"]) for node in nodes), reverse=True)
        best, where = lends[0]
        if best < gib:
            sentences.append(f"The node that lends most is {where}, with {best} GiB on one device.")
            advice.append(
                "Ask for less (valve.io/gpu-memory), wait until offline pods end, or lower "
                "memory.onlineFloor."
            )
        else:
            sentences.append(f"{where} would lend {best} GiB: it is something else that keeps the pod away.")
    return Explanation(name, "pending", tuple(sentences), tuple(advice))


def lendable_gib(node: Mapping[str, Any]) -> int:
    """Whole GiB that one device of a node could still give to a new offline pod: what is free beyond the
    reservation."""
    best = 0
    for gpu in (node.get("status") or {}).get("gpus") or []:
        best = max(best, (_bytes(gpu.get("free")) - _bytes(gpu.get("reservation"))) // GIB)
    return best


def _not_running(
    pod: Mapping[str, Any], name: str, events: Sequence[Mapping[str, Any]]
) -> Explanation | None:
    """It has a node and no running container: why."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    if statuses and all("running" in (status.get("state") or {}) for status in statuses):
        return None
    sentences = [f"{name} is on node {pod['spec']['nodeName']}, but does not run."]
    advice = []
    for status in statuses:
        waiting = (status.get("state") or {}).get("waiting")
        if waiting:
            words = f"{waiting.get('reason', 'it waits')}: {waiting.get('message', '')}".rstrip(": ")
            sentences.append(f"Container {status['name']}: {words}.")
    if _exit_code(pod) == REFUSED_EXIT:
        sentences.append("libvalve ended it before, because the agent refuses this offline process.")
        advice.append(f"Its log says why: kubectl logs --previous -n {name.replace('/', ' ')}")
    warnings = [event for event in events if event.get("type") == "Warning"]
    if warnings:
        sentences.append(f"Last warning: {warnings[-1]['message']}")
    return Explanation(name, "starting", tuple(sentences), tuple(advice))


def _exit_code(pod: Mapping[str, Any]) -> int | None:
    for status in pod.get("status", {}).get("containerStatuses") or []:
        for state in (status.get("state") or {}, status.get("lastState") or {}):
            if "terminated" in state:
                return int(state["terminated"]["exitCode"])
    return None


def _running(
    name: str, workload: str, where: str, node: Mapping[str, Any] | None, now: datetime
) -> Explanation:
    if node is None:
        return Explanation(
            name, "unknown", (f"{name} runs on {where}, which no ColocationPolicy selects any more.",),
            ("Offline does not run without an agent: let a policy select the node, or move the pod.",),
        )  # fmt: skip
    status = node.get("status") or {}
    silent = _silent_s(status, now)
    if silent is None or silent > SILENT_S:
        since = "has not reported yet" if silent is None else f"has not reported for {silent:.0f} s"
        goes = "Online goes on with the memory it holds" if workload == "online" else "Offline stays stopped"
        return Explanation(
            name, "unknown",
            (f"{name} runs on {where}, whose node agent {since}.", f"{goes} until it is back."),
            ("See the runbook ValveAgentSilent.",),
        )  # fmt: skip
    for gpu in status.get("gpus") or []:
        for tenant in gpu.get("tenants") or []:
            if tenant["name"] == name or tenant["name"].startswith(f"{name}/"):
                return _tenant(name, gpu, tenant)
    return Explanation(
        name, "waiting", (f"{name} runs on {where}, but the node agent knows no engine of it.",
                          "The engine has not started yet, or runs without libvalve."),
        ("If it stays like this: the container must not be statically linked, and its log must have no line "
         "of libvalve that refuses.",),
    )  # fmt: skip


def _silent_s(status: Mapping[str, Any], now: datetime) -> float | None:
    """Seconds since the agent's last report; None: never."""
    text = status.get("reportedAt")
    if not text:
        return 0.0 if status.get("gpus") else None
    return (now - datetime.fromisoformat(str(text).replace("Z", "+00:00"))).total_seconds()


def _tenant(name: str, gpu: Mapping[str, Any], tenant: Mapping[str, Any]) -> Explanation:
    held, limit = _bytes(tenant.get("memory")), _bytes(tenant.get("limit"))
    memory = f"It holds {format_quantity(held)} of at most {format_quantity(limit)}."
    if not tenant.get("processes"):
        return Explanation(
            name, "waiting", (f"{name} is known on {gpu['id']}, but no engine has attached yet.",)
        )
    if tenant["workload"] == "online":
        return _online(name, gpu, tenant, memory)
    growth = _why_not_more(gpu, held, limit)
    if not gpu.get("paused"):
        return Explanation(name, "running", (f"{name} runs on {gpu['id']}.", memory, *growth))
    reason = gpu.get("pausedReason") or "busy"
    busy = [
        other["name"]
        for other in gpu.get("tenants") or []
        if other["workload"] == "online" and other.get("busy")
    ]
    if reason == "busy" and busy:
        why = f"{_and(busy)} {'has' if len(busy) == 1 else 'have'} requests, and online goes first"
    else:
        why = _PAUSED.get(reason, reason)
    return Explanation(name, "paused", (f"{name} is paused on {gpu['id']}: {why}.", memory, *growth))


def _online(name: str, gpu: Mapping[str, Any], tenant: Mapping[str, Any], memory: str) -> Explanation:
    state = "busy" if tenant.get("busy") else "idle"
    sentences = [f"{name} is {state} on {gpu['id']}.", memory]
    latency = gpu.get("preemptLatency") or {}
    if latency.get("samples"):
        median, p99 = latency["p50Us"], latency["p99Us"]
        sentences.append(f"Offline stops within {median} µs (median), {p99} µs (p99) of a request.")
    return Explanation(name, state, tuple(sentences))


def _why_not_more(gpu: Mapping[str, Any], held: int, limit: int) -> list[str]:
    if held >= limit:
        return []
    free, kept = _bytes(gpu.get("free")), _bytes(gpu.get("reservation"))
    if free <= kept:
        return [f"It gets no more now: what is free ({format_quantity(free)}) is kept for online."]
    return []


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _bytes(text: Any) -> int:
    try:
        return int(Quantity(str(text)))
    except UnitError:
        return 0
