# SPDX-License-Identifier: Apache-2.0
"""One action, one request (and the events that go with it). Called by executor.py; everything else is its
affair.

What the API server answers goes to `seen`, so that the World knows the object before the watch tells.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from valve_api.names import API_VERSION
from valve_operator.actions import (
    Action,
    DeleteDaemonSet,
    DeleteNode,
    EventNote,
    Evict,
    LabelNode,
    WriteDaemonSet,
    WriteNode,
    WriteStatus,
)
from valve_operator.api import COLONODES, NODES, POLICIES, Api, Kind, colocation_node
from valve_operator.errors import ApiError, ConflictError, GoneError

log = logging.getLogger(__name__)

Json = dict[str, Any]
CLUSTER_EVENTS = "default"
"""Namespace of events on objects that have none: the API server allows no other."""


class Writes:
    """seen(kind, object) takes over an object as the server shows it; gone(kind, name) drops one."""

    def __init__(
        self,
        api: Api,
        daemonsets: Kind,
        identity: str,
        seen: Callable[[str, Json], None],
        gone: Callable[[str, str], None],
    ) -> None:
        self._api = api
        self._daemonsets = daemonsets
        self._identity = identity
        self._seen = seen
        self._gone = gone

    async def do(self, action: Action) -> None:
        """Raises ApiError where the request failed; an event that failed is only logged."""
        match action:
            case WriteNode(name, spec, owner_uid):
                self._seen(
                    "ColocationNode", await self._api.apply(COLONODES, colocation_node(name, spec, owner_uid))
                )
            case DeleteNode(name, uid):
                await self._delete(COLONODES, name, uid)
            case LabelNode(name, uid, labels):  # with the uid: an apply must not create a Node that is gone
                meta = {"name": name, "uid": uid, "labels": labels}
                manifest = {"apiVersion": "v1", "kind": "Node", "metadata": meta}
                self._seen("Node", await self._api.apply(NODES, manifest))
            case WriteDaemonSet(_, manifest):
                self._seen("DaemonSet", await self._api.apply(self._daemonsets, manifest))
            case DeleteDaemonSet(name, uid):
                await self._delete(self._daemonsets, name, uid)
            case WriteStatus(name, uid, status, _, events):
                await self._status(name, uid, status, events)
            case Evict(namespace, name, uid, event):
                await self._evict(namespace, name, uid, event)

    async def _delete(self, kind: Kind, name: str, uid: str) -> None:
        try:
            await self._api.delete(kind, name, uid)
        except (GoneError, ConflictError):  # gone, or by now another object of that name: not ours to delete
            log.debug("%s %s is gone already", kind.name, name)
        self._gone(kind.name, name)

    async def _status(self, name: str, uid: str, status: Json, events: Sequence[EventNote]) -> None:
        manifest = {
            "apiVersion": API_VERSION,
            "kind": POLICIES.name,
            "metadata": {"name": name, "uid": uid},
            "status": status,
        }
        self._seen(POLICIES.name, await self._api.apply(POLICIES, manifest, "status"))
        for event in events:
            await self._event(
                {"apiVersion": API_VERSION, "kind": POLICIES.name, "name": name, "uid": uid}, event
            )

    async def _evict(self, namespace: str, name: str, uid: str, event: EventNote) -> None:
        meta = {"name": name, "namespace": namespace}
        options = {"preconditions": {"uid": uid}}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta, "deleteOptions": options}
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
        await self._api.create(path, body)
        about = {"apiVersion": "v1", "kind": "Pod", "name": name, "namespace": namespace, "uid": uid}
        await self._event(about, event)

    async def _event(self, about: Json, note: EventNote) -> None:
        """Posts an event under a name made of what it says: a replica that takes over posts it no "
        "second time."""
        namespace = about.get("namespace") or CLUSTER_EVENTS
        said = "\0".join((about["uid"], note.reason, note.message))
        digest = hashlib.sha256(said.encode()).hexdigest()[:16]
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{about['name'][:230]}.{digest}", "namespace": namespace},
            "involvedObject": about,
            "type": note.type,
            "reason": note.reason,
            "message": note.message,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "reportingComponent": "valve.io/operator",
            "reportingInstance": self._identity,
            "source": {"component": "valve-operator"},
        }
        try:
            await self._api.create(f"/api/v1/namespaces/{namespace}/events", body)
        except ConflictError:
            log.debug("event told already: %s", note.reason)
        except ApiError as error:
            log.warning("event %s on %s is not posted: %s", note.reason, about["name"], error)
