# SPDX-License-Identifier: Apache-2.0
"""What reconcile can ask for. Immutable values; the executor alone turns them into requests.

Each action is idempotent: done twice, or by two replicas, it leaves the cluster as done once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EventNote:
    """A Kubernetes Event to post once the action it belongs to is done."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class WriteNode:
    """Make the ColocationNode's spec this, and the Node its owner."""

    name: str
    spec: Json
    owner_uid: str


@dataclass(frozen=True, slots=True)
class DeleteNode:
    """Delete the ColocationNode with this uid."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class LabelNode:
    """Make Valve's labels on the Node with this uid exactly these."""

    name: str
    uid: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class WriteDaemonSet:
    """Make the DaemonSet this; the digest is in its annotations."""

    name: str
    manifest: Json


@dataclass(frozen=True, slots=True)
class DeleteDaemonSet:
    """Delete the DaemonSet with this uid."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class WriteStatus:
    """Make the policy's status this. urgent: more than figures changed, so it does not wait for its turn."""

    name: str
    uid: str
    status: Json
    urgent: bool
    events: tuple[EventNote, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Evict:
    """Ask for the eviction of the pod with this uid; its disruption budget decides."""

    namespace: str
    name: str
    uid: str
    event: EventNote


Action = WriteNode | DeleteNode | LabelNode | WriteDaemonSet | DeleteDaemonSet | WriteStatus | Evict


def key_of(action: Action) -> tuple[str, str]:
    """What the action is about: two actions of one key are never done at the same time."""
    namespace = f"{action.namespace}/" if isinstance(action, Evict) else ""
    return (type(action).__name__, namespace + action.name)
