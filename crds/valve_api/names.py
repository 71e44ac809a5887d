# SPDX-License-Identifier: Apache-2.0
"""The names that Valve shows to Kubernetes and to Prometheus, each written once.

Read by every component; constants only, no third-party import.
"""

from __future__ import annotations

from enum import StrEnum

GROUP = "valve.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
CATEGORY = "valve"
"""`kubectl get valve` lists every kind of this group."""

KIND_POLICY = "ColocationPolicy"
PLURAL_POLICY = "colocationpolicies"
SHORT_POLICY = "colo"
KIND_NODE = "ColocationNode"
PLURAL_NODE = "colocationnodes"
SHORT_NODE = "colonode"

ANNOTATION_WORKLOAD = f"{GROUP}/workload"
"""On a pod: `online` or `offline`. A pod without it is none of Valve's business."""
ANNOTATION_GPU_MEMORY = f"{GROUP}/gpu-memory"
"""On an offline pod: most device memory it may hold, a quantity such as 24Gi."""

ANNOTATION_CONTAINER = f"{GROUP}/container"
"""On a pod of several containers: the one that holds the engine, and so gets the resource."""

LABEL_WORKLOAD = ANNOTATION_WORKLOAD
"""On an annotated pod, given by admission: annotations cannot be selected."""
LABEL_MANAGED = f"{GROUP}/managed"
"""On a node that a policy holds on, `true`: where the DaemonSets of agent and device plugin run."""
LABEL_STARVED = f"{GROUP}/starved"
"""On a node whose offline pods have been paused longer than the policy allows, `true`."""

RESOURCE_ONLINE_GPU = f"{GROUP}/online-gpu"
"""Extended resource: online seats, one per GPU."""
RESOURCE_OFFLINE_MEMORY = f"{GROUP}/offline-memory-gib"
"""Extended resource: offline memory in whole GiB (the kubelet's 4 MiB message limit rules out MiB)."""
RESOURCES = (RESOURCE_ONLINE_GPU, RESOURCE_OFFLINE_MEMORY)
OFFLINE_MEMORY_UNIT_BYTES = 1 << 30

METRIC_PREFIX = "valve"
EVENT_SCHEMA = f"{GROUP}/events/v1"

ARENA_SLABS_MAX = 4096
"""Slabs in one tenant's arena: VALVE_SLABS_MAX of valve_protocol.h."""
DEVICE_SLABS_MIN = 8
"""Fewer slabs than this and reservation, floor and both tenants cannot all have one."""
DEVICE_SLABS_MAX = 16 * ARENA_SLABS_MAX
"""Bounds the pool's bookkeeping; one tenant can map ARENA_SLABS_MAX of them."""


class Workload(StrEnum):
    """Value of ANNOTATION_WORKLOAD, and the role of a tenant."""

    ONLINE = "online"
    OFFLINE = "offline"
