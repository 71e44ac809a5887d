# SPDX-License-Identifier: Apache-2.0
"""Events on pods: why Valve ended or refused a process of theirs.

Why it exists: who owns a pod reads `kubectl describe pod`, not the log of the node's agent. Whatever the
agent does to a process without being asked shows there, with the same sentence as in its log.

A pod is told of one thing at most once a minute, a node posts at most PER_MINUTE events, and what the API
server does not take is given up: the log has it. A process may be gone before its event is read, so the pods
of processes that attached are remembered.

Threading model: `hear` is called by the server thread (EventLog.listen), reads a file of /proc and never
waits; a daemon thread posts. Caller: kube/node.py.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from valve_agent.kube.api import Api, KubeError
from valve_agent.kube.report import stamp
from valve_agent.policy.rate import RateLimit

COMPONENT = "valve-agent"
PER_MINUTE = 60
AGAIN_NS = 60_000_000_000
REMEMBERED_MAX = 1024
NOTE_MAX = 1024
REASONS = {
    "kill": "ValveKilled",
    "uncontrolled": "ValveKilled",
    "wrong-gpu": "ValveKilled",
    "unknown-process": "ValveUnknownProcess",
    "denied": "ValveMemoryDenied",
    "overuse": "ValveMemoryOveruse",
}
"""Event of the log -> reason of the pod's event."""


class Pod(NamedTuple):
    uid: str
    namespace: str
    name: str
    container: str


class PodEvents:
    def __init__(
        self,
        api: Api,
        node: str,
        pod_of: Callable[[int], Pod | None],
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`pod_of`: whose container a process is in; None for one of no pod."""
        self.error = ""
        """Why the last event could not be posted."""
        self._api = api
        self._node = node
        self._pod_of = pod_of
        self._clock = clock
        self._pods: OrderedDict[int, Pod] = OrderedDict()
        self._told: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._limit = RateLimit(PER_MINUTE, PER_MINUTE, clock())
        self._queue: queue.SimpleQueue[tuple[Pod, str, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="valve-pod-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def hear(self, event: str, fields: Mapping[str, Any]) -> None:
        """Something that the agent wrote into its log."""
        pid, reason = fields.get("pid"), REASONS.get(event)
        if not isinstance(pid, int) or (reason is None and event != "attach"):
            return
        pod = self._pod_of(pid) or (self._pods.get(pid) if event != "attach" else None)
        if pod is None:
            return
        if reason is None:
            _put(self._pods, pid, pod)
        elif self._may_tell(pod, reason):
            self._queue.put((pod, reason, str(fields.get("why", ""))))

    def _may_tell(self, pod: Pod, reason: str) -> bool:
        now, key = self._clock(), (pod.uid, reason)
        if now - self._told.get(key, now - AGAIN_NS) < AGAIN_NS or not self._limit.allow(now):
            return False
        _put(self._told, key, now)
        return True

    def _loop(self) -> None:
        while (told := self._queue.get()) is not None:
            pod, reason, why = told
            try:
                self._api.post(f"/api/v1/namespaces/{pod.namespace}/events", self._event(pod, reason, why))
            except KubeError as error:
                self.error = str(error)
            else:
                self.error = ""

    def _event(self, pod: Pod, reason: str, why: str) -> dict[str, Any]:
        now = stamp(datetime.now(UTC))
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{pod.name[:200]}.{uuid.uuid4().hex[:16]}", "namespace": pod.namespace},
            "involvedObject": {
                "apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name,
                "uid": pod.uid, "fieldPath": f"spec.containers{{{pod.container}}}",
            },
            "reason": reason,
            "message": why[:NOTE_MAX],
            "type": "Warning",
            "source": {"component": COMPONENT, "host": self._node},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._node,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }  # fmt: skip


def _put(known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Remember it as the newest; the oldest make room."""
    known[key] = value
    known.move_to_end(key)
    while len(known) > REMEMBERED_MAX:
        known.popitem(last=False)
