# SPDX-License-Identifier: Apache-2.0
"""What Valve's annotations on a pod turn into, or the sentence that says what to write instead. Pure.

    valve.io/workload: online | offline      what the pod is
    valve.io/gpu-memory: 24Gi                offline: the most device memory it may hold
    valve.io/container: NAME                 of several containers, the one that holds the engine

`decide` is given the pod as the API server shows it before it exists, and answers with the changed pod. It is
idempotent: a pod that went through it once, or whose author wrote the resources by hand, is changed no
further. Every contradiction is a refusal, for an annotated pod that is not protected must not run. All
problems are told at once. Called by webhook.py, in any replica; docs/annotations.md is its table of cases.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from valve_api.errors import UnitError
from valve_api.names import (
    ANNOTATION_CONTAINER,
    ANNOTATION_GPU_MEMORY,
    ANNOTATION_WORKLOAD,
    GROUP,
    LABEL_STARVED,
    LABEL_WORKLOAD,
    OFFLINE_MEMORY_UNIT_BYTES,
    RESOURCE_OFFLINE_MEMORY,
    RESOURCE_ONLINE_GPU,
    Workload,
)
from valve_api.quantity import DEVICE_BYTES_MAX, Quantity, format_quantity

Json = dict[str, Any]

ANNOTATIONS: Final = (ANNOTATION_WORKLOAD, ANNOTATION_GPU_MEMORY, ANNOTATION_CONTAINER)
RUNTIME_ENV: Final = "VALVE_"
"""Environment that only the device plugin may set: a pod's own would win over it."""
VISIBLE_DEVICES: Final = ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
PRELOAD_PATHS: Final = ("/etc", "/etc/ld.so.preload")
AVOID_STARVED: Final = {
    "weight": 100,
    "preference": {"matchExpressions": [{"key": LABEL_STARVED, "operator": "DoesNotExist"}]},
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What admission gives to annotated pods that say nothing themselves; from flags.

    Empty class names: the pod gets none. tolerations: keys of taints of GPU nodes.
    """

    online_priority_class: str = ""
    offline_priority_class: str = ""
    tolerations: tuple[str, ...] = ("nvidia.com/gpu",)


@dataclass(frozen=True, slots=True)
class Admitted:
    """The pod as it shall be; the very pod that was given where nothing concerns Valve."""

    pod: Json


@dataclass(frozen=True, slots=True)
class Refused:
    """Every problem, each with what to write instead."""

    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.sentences)


def concerns_valve(pod: Mapping[str, Any]) -> bool:
    """An annotation or a resource of valve.io is there."""
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    return any(key.startswith(f"{GROUP}/") for key in annotations) or any(
        _asks(container) for container in _every_container(pod)
    )


def decide(pod: Json, defaults: Defaults) -> Admitted | Refused:
    """The changed pod, or why it may not be."""
    if not concerns_valve(pod):
        return Admitted(pod)
    annotations: Mapping[str, str] = (pod.get("metadata") or {}).get("annotations") or {}
    problems = [*_unknown(annotations), *_workload_problems(annotations)]
    if problems:  # whatever else is wrong depends on what the pod is
        return Refused(tuple(problems))
    workload = Workload(annotations[ANNOTATION_WORKLOAD])
    container, problem = _engine_container(pod, annotations, workload)
    problems = [problem] if problem else []
    memory_gib, found = _memory(annotations, workload)
    problems += found
    problems += _pod_problems(pod, workload)
    if container is not None:
        problems += _resource_problems(pod, container, workload, memory_gib)
    if problems or container is None:
        return Refused(tuple(problems))
    return Admitted(_changed(pod, container["name"], workload, memory_gib, defaults))


def _unknown(annotations: Mapping[str, str]) -> Iterator[str]:
    for key in sorted(annotations):
        if key.startswith(f"{GROUP}/") and key not in ANNOTATIONS:
            known = [annotation.partition("/")[2] for annotation in ANNOTATIONS]
            near = difflib.get_close_matches(key.partition("/")[2].lower(), known, n=1)
            hint = f"did you mean {GROUP}/{near[0]}?" if near else f"known are {', '.join(ANNOTATIONS)}"
            yield f"{key} is no annotation of Valve; {hint}"


def _workload_problems(annotations: Mapping[str, str]) -> Iterator[str]:
    given = annotations.get(ANNOTATION_WORKLOAD)
    if given is None:
        yield (
            f"the annotation {ANNOTATION_WORKLOAD} is missing; write {ANNOTATION_WORKLOAD}: online or offline"
        )
    elif given not in tuple(Workload):
        yield f"{ANNOTATION_WORKLOAD} is {_quoted(given)}; write online or offline"


def _engine_container(
    pod: Json, annotations: Mapping[str, str], workload: Workload
) -> tuple[Json | None, str]:
    """The container that gets the resource, or a sentence."""
    containers: list[Json] = (pod.get("spec") or {}).get("containers") or []
    names = [container["name"] for container in containers]
    wanted = annotations.get(ANNOTATION_CONTAINER)
    if wanted is not None:
        found = [container for container in containers if container["name"] == wanted]
        if found:
            return found[0], ""
        return None, f"{ANNOTATION_CONTAINER} is {_quoted(wanted)}; write one of {', '.join(names)}"
    asking = [container for container in containers if _asks(container)]
    if len(asking) == 1:
        return asking[0], ""
    if len(containers) == 1:
        return containers[0], ""
    return None, (
        f"the pod has {len(containers)} containers; say which one holds the {workload} engine: "
        f"{ANNOTATION_CONTAINER}: one of {', '.join(names)}"
    )


def _memory(annotations: Mapping[str, str], workload: Workload) -> tuple[int, list[str]]:
    """GiB, rounded up, and problems."""
    given = annotations.get(ANNOTATION_GPU_MEMORY)
    if workload is Workload.ONLINE:
        if given is None:
            return 0, []
        return 0, [
            f"{ANNOTATION_GPU_MEMORY} limits offline pods; remove it from this online pod, whose memory is "
            "limited by its engine's own setting"
        ]
    if given is None:
        return 0, [
            f"the annotation {ANNOTATION_GPU_MEMORY} is missing; write the most device memory that "
            "the offline "
            f"pod may hold, {ANNOTATION_GPU_MEMORY}: 24Gi for example"
        ]
    try:
        size = Quantity(given)
    except UnitError as error:
        return 0, [f"{ANNOTATION_GPU_MEMORY} is {_quoted(given)}: {error}"]
    if not 0 < size <= DEVICE_BYTES_MAX:
        top = format_quantity(DEVICE_BYTES_MAX)
        return 0, [f"{ANNOTATION_GPU_MEMORY} is {_quoted(given)}; write more than 0 and at most {top}"]
    return -(-size // OFFLINE_MEMORY_UNIT_BYTES), []


def _pod_problems(pod: Json, workload: Workload) -> Iterator[str]:
    label = ((pod.get("metadata") or {}).get("labels") or {}).get(LABEL_WORKLOAD)
    if label not in (None, workload):
        yield (
            f"the label {LABEL_WORKLOAD} is {_quoted(label)} and the annotation {workload}; remove the label"
        )
    for container in _every_container(pod):
        name = container["name"]
        if workload is Workload.OFFLINE and (container.get("securityContext") or {}).get("privileged"):
            yield (
                f"container {name} is privileged and would reach every GPU of the node past Valve; remove "
                "securityContext.privileged"
            )
        for env in container.get("env") or ():
            if env["name"].startswith(RUNTIME_ENV):
                yield f"container {name} sets {env['name']}, which Valve sets itself; remove it"
            elif env["name"] in VISIBLE_DEVICES:
                yield f"container {name} sets {env['name']}, but Valve chooses the GPU; remove it"
        for mount in container.get("volumeMounts") or ():
            if mount["mountPath"].rstrip("/") in PRELOAD_PATHS:
                yield (
                    f"container {name} mounts a volume at {mount['mountPath']}, which would hide "
                    "Valve's runtime; "
                    "mount it elsewhere"
                )


def _resource_problems(pod: Json, engine: Json, workload: Workload, memory_gib: int) -> Iterator[str]:
    right = RESOURCE_ONLINE_GPU if workload is Workload.ONLINE else RESOURCE_OFFLINE_MEMORY
    for container in _every_container(pod):
        for resource, amount in sorted(_asks(container).items()):
            if resource != right:
                yield (
                    f"container {container['name']} asks for {resource}; an {workload} pod has {right}: "
                    "remove it"
                )
            elif container["name"] != engine["name"]:
                yield (
                    f"container {container['name']} asks for {resource}, but {engine['name']} holds "
                    "the engine; "
                    "remove it"
                )
            elif workload is Workload.OFFLINE and memory_gib and amount != str(memory_gib):
                yield (
                    f"container {container['name']} asks for {resource}: {amount} and "
                    f"{ANNOTATION_GPU_MEMORY} "
                    f"means {memory_gib}; remove the resource, the annotation is enough"
                )
            elif amount == "0":
                yield f"container {container['name']} asks for {resource}: 0; remove it or write 1"
        for resource in sorted(_limits(container)):
            if resource.startswith("nvidia.com/"):
                yield (
                    f"container {container['name']} asks for {resource}, which gives it a GPU of its "
                    "own that "
                    f"Valve does not share; remove it, {ANNOTATION_WORKLOAD} asks for {right} instead"
                )


def _changed(pod: Json, engine: str, workload: Workload, memory_gib: int, defaults: Defaults) -> Json:
    changed = copy.deepcopy(pod)
    meta, spec = changed.setdefault("metadata", {}), changed["spec"]
    meta.setdefault("labels", {})[LABEL_WORKLOAD] = str(workload)
    online = workload is Workload.ONLINE
    container = next(c for c in spec["containers"] if c["name"] == engine)
    resource = RESOURCE_ONLINE_GPU if online else RESOURCE_OFFLINE_MEMORY
    amount = str(_asks(container).get(resource, "1")) if online else str(memory_gib)
    resources = container.setdefault("resources", {})
    for kind in ("limits", "requests"):
        resources[kind] = {**(resources.get(kind) or {}), resource: amount}
    _prioritize(spec, defaults.online_priority_class if online else defaults.offline_priority_class)
    tolerations = spec.setdefault("tolerations", [])
    for key in defaults.tolerations:
        if not any(_tolerates(t, key) for t in tolerations):
            tolerations.append({"key": key, "operator": "Exists", "effect": "NoSchedule"})
    if not tolerations:
        del spec["tolerations"]
    if not online:
        _avoid_starved(spec)
    return changed


def _prioritize(spec: Json, class_name: str) -> None:
    """Gives the class to a pod that names none. The API server has by then given it the default priority;
    that goes, so that it takes the class's instead of refusing the contradiction."""
    if class_name and not spec.get("priorityClassName"):
        spec["priorityClassName"] = class_name
        spec.pop("priority", None)
        spec.pop("preemptionPolicy", None)


def _avoid_starved(spec: Json) -> None:
    affinity = spec["affinity"] = spec.get("affinity") or {}
    node = affinity["nodeAffinity"] = affinity.get("nodeAffinity") or {}
    key = "preferredDuringSchedulingIgnoredDuringExecution"
    preferred = node[key] = node.get(key) or []
    if AVOID_STARVED not in preferred:
        preferred.append(copy.deepcopy(AVOID_STARVED))


def _tolerates(toleration: Mapping[str, Any], key: str) -> bool:
    return toleration.get("key", "") in ("", key) and toleration.get("effect", "") in ("", "NoSchedule")


def _every_container(pod: Mapping[str, Any]) -> Iterator[Json]:
    spec = pod.get("spec") or {}
    yield from spec.get("containers") or ()
    yield from spec.get("initContainers") or ()


def _limits(container: Mapping[str, Any]) -> Json:
    resources = container.get("resources") or {}
    return {**(resources.get("requests") or {}), **(resources.get("limits") or {})}


def _asks(container: Mapping[str, Any]) -> dict[str, str]:
    """Resources of Valve that a container asks for."""
    return {name: str(amount) for name, amount in _limits(container).items() if name.startswith(f"{GROUP}/")}


def _quoted(value: object) -> str:
    text = str(value)
    return '"' + (text if len(text) <= 60 else text[:59] + "…") + '"'
