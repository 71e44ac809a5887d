# SPDX-License-Identifier: Apache-2.0
"""Annotations and what becomes of them: the table that docs/annotations.md shows and the tests check.

Data only. `outcome` is what `admission.decide` must answer: a dict of what the engine's container asks for,
or the sentences of the refusal. Read by reference.py and by tests/unit/operator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One pod. annotations without `valve.io/`; containers: name → fields beside the name."""

    what: str
    annotations: dict[str, str]
    outcome: dict[str, str] | tuple[str, ...]
    containers: dict[str, Json] = field(default_factory=lambda: {"engine": {}})
    engine: str = "engine"
    labels: dict[str, str] = field(default_factory=dict)

    def pod(self) -> Json:
        """The pod as its author wrote it."""
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "pod",
                "namespace": "default",
                "labels": dict(self.labels),
                "annotations": {f"valve.io/{key}": value for key, value in self.annotations.items()},
            },
            "spec": {"containers": [{"name": name, **rest} for name, rest in self.containers.items()]},
        }


def _limits(**amounts: str) -> Json:
    names = {"gpu": "nvidia.com/gpu", "seat": "valve.io/online-gpu", "gib": "valve.io/offline-memory-gib"}
    return {"resources": {"limits": {names[name]: amount for name, amount in amounts.items()}}}


ONLINE = {"workload": "online"}
OFFLINE = {"workload": "offline", "gpu-memory": "24Gi"}

CASES: tuple[Case, ...] = (
    Case("An online pod takes a seat on one GPU.", ONLINE, {"valve.io/online-gpu": "1"}),
    Case(
        "An online engine that spans two GPUs says so itself.",
        ONLINE,
        {"valve.io/online-gpu": "2"},
        {"engine": _limits(seat="2")},
    ),
    Case("An offline pod asks for its memory.", OFFLINE, {"valve.io/offline-memory-gib": "24"}),
    Case(
        "Sizes are rounded up to whole GiB.",
        {"workload": "offline", "gpu-memory": "1500Mi"},
        {"valve.io/offline-memory-gib": "2"},
    ),
    Case(
        "Decimal units are understood as Kubernetes does.",
        {"workload": "offline", "gpu-memory": "80G"},
        {"valve.io/offline-memory-gib": "75"},
    ),
    Case(
        "With a sidecar, the annotation says which container is the engine.",
        {**ONLINE, "container": "vllm"},
        {"valve.io/online-gpu": "1"},
        {"vllm": {}, "proxy": {}},
        engine="vllm",
    ),
    Case(
        "A container that asks for the resource is the engine, whatever is injected beside it.",
        OFFLINE,
        {"valve.io/offline-memory-gib": "24"},
        {"proxy": {}, "batch": _limits(gib="24")},
        engine="batch",
    ),
    Case(
        "Several containers and no word which.",
        ONLINE,
        (
            "the pod has 2 containers; say which one holds the online engine: valve.io/container: "
            "one of vllm, proxy",
        ),
        {"vllm": {}, "proxy": {}},
    ),
    Case(
        "A container that is not there.",
        {**ONLINE, "container": "vlm"},
        ('valve.io/container is "vlm"; write one of vllm, proxy',),
        {"vllm": {}, "proxy": {}},
    ),
    Case(
        "Upper case.",
        {"workload": "Online"},
        ('valve.io/workload is "Online"; write online or offline',),
    ),
    Case(
        "A misspelt annotation would run unprotected, so it is refused.",
        {"workloads": "online"},
        (
            "valve.io/workloads is no annotation of Valve; did you mean valve.io/workload?",
            "the annotation valve.io/workload is missing; write valve.io/workload: online or offline",
        ),
    ),
    Case(
        "An annotation that Valve does not know.",
        {**ONLINE, "priority": "high"},
        (
            "valve.io/priority is no annotation of Valve; known are valve.io/workload, valve.io/gpu-memory, "
            "valve.io/container",
        ),
    ),
    Case(
        "Memory without a workload.",
        {"gpu-memory": "24Gi"},
        ("the annotation valve.io/workload is missing; write valve.io/workload: online or offline",),
    ),
    Case(
        "A resource without an annotation.",
        {},
        ("the annotation valve.io/workload is missing; write valve.io/workload: online or offline",),
        {"engine": _limits(gib="24")},
    ),
    Case(
        "Offline without memory.",
        {"workload": "offline"},
        (
            "the annotation valve.io/gpu-memory is missing; write the most device memory that the "
            "offline pod may "
            "hold, valve.io/gpu-memory: 24Gi for example",
        ),
    ),
    Case(
        "Online with memory.",
        {"workload": "online", "gpu-memory": "24Gi"},
        (
            "valve.io/gpu-memory limits offline pods; remove it from this online pod, whose memory "
            "is limited by "
            "its engine's own setting",
        ),
    ),
    Case(
        "A unit that is none.",
        {"workload": "offline", "gpu-memory": "24GB"},
        (
            'valve.io/gpu-memory is "24GB": GB is not a unit of memory (did you mean G?); write '
            "64Mi, 1536Mi, 24Gi, "
            "80G or a plain number of bytes",
        ),
    ),
    Case(
        "A fraction.",
        {"workload": "offline", "gpu-memory": "1.5Gi"},
        ('valve.io/gpu-memory is "1.5Gi": a quantity has no fraction; write 1536Mi',),
    ),
    Case(
        "Nothing.",
        {"workload": "offline", "gpu-memory": "0"},
        ('valve.io/gpu-memory is "0"; write more than 0 and at most 16Ti',),
    ),
    Case(
        "A GPU of its own beside Valve's.",
        ONLINE,
        (
            "container engine asks for nvidia.com/gpu, which gives it a GPU of its own that Valve "
            "does not share; "
            "remove it, valve.io/workload asks for valve.io/online-gpu instead",
        ),
        {"engine": _limits(gpu="1")},
    ),
    Case(
        "The other workload's resource.",
        ONLINE,
        (
            "container engine asks for valve.io/offline-memory-gib; an online pod has "
            "valve.io/online-gpu: remove it",
        ),
        {"engine": _limits(gib="24")},
    ),
    Case(
        "Resource and annotation differ.",
        OFFLINE,
        (
            "container engine asks for valve.io/offline-memory-gib: 48 and valve.io/gpu-memory means "
            "24; remove the "
            "resource, the annotation is enough",
        ),
        {"engine": _limits(gib="48")},
    ),
    Case(
        "A privileged offline container.",
        OFFLINE,
        (
            "container engine is privileged and would reach every GPU of the node past Valve; remove "
            "securityContext.privileged",
        ),
        {"engine": {"securityContext": {"privileged": True}}},
    ),
    Case(
        "The pod chooses its GPU.",
        ONLINE,
        ("container engine sets NVIDIA_VISIBLE_DEVICES, but Valve chooses the GPU; remove it",),
        {"engine": {"env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]}},
    ),
    Case(
        "The pod sets what the runtime reads.",
        OFFLINE,
        ("container engine sets VALVE_SOCKET, which Valve sets itself; remove it",),
        {"engine": {"env": [{"name": "VALVE_SOCKET", "value": "/tmp/s"}]}},
    ),
    Case(
        "A volume over /etc.",
        ONLINE,
        ("container engine mounts a volume at /etc, which would hide Valve's runtime; mount it elsewhere",),
        {"engine": {"volumeMounts": [{"name": "conf", "mountPath": "/etc"}]}},
    ),
    Case(
        "Label and annotation differ.",
        ONLINE,
        ('the label valve.io/workload is "offline" and the annotation online; remove the label',),
        labels={"valve.io/workload": "offline"},
    ),
    Case(
        "Everything that is wrong is told at once.",
        {"workload": "offline", "container": "batch"},
        (
            'valve.io/container is "batch"; write one of engine',
            "the annotation valve.io/gpu-memory is missing; write the most device memory that the "
            "offline pod may "
            "hold, valve.io/gpu-memory: 24Gi for example",
            "container engine is privileged and would reach every GPU of the node past Valve; remove "
            "securityContext.privileged",
        ),
        {"engine": {"securityContext": {"privileged": True}}},
    ),
)
