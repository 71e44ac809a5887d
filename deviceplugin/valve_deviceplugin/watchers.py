# SPDX-License-Identifier: Apache-2.0
"""The two threads that bring news: the agent's every second, the kubelet's soon after every Allocate.

Why they exist: both sources may be slow or gone, and neither may delay the kubelet's calls.

Threading model: one thread each, ended by `stop`. Callers: main; publish.py asks for a fresh kubelet listing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

from valve_deviceplugin.agent_status import read_status, reports_of
from valve_deviceplugin.errors import AgentError, KubeletError
from valve_deviceplugin.log import Log
from valve_deviceplugin.metrics import Metrics
from valve_deviceplugin.state import Node
from valve_deviceplugin.timing import Timing
from valve_kubelet.podresources import NoListError, PodResources

AGENT_EVERY_S = 1.0
AGENT_TIMEOUT_S = 2.0
LIST_EVERY_S = 2.0
LIST_SOON_S = 0.25
"""While there is a container whose name we do not know."""


class AgentWatcher:
    def __init__(self, agent_socket: Path, node: Node, log: Log, metrics: Metrics) -> None:
        self._socket, self._node, self._log, self._metrics = agent_socket, node, log, metrics
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="agent", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """One look at the agent."""
        try:
            self._node.observe(reports_of(read_status(self._socket, AGENT_TIMEOUT_S)))
        except AgentError as error:
            self._metrics.agent_up(False)
            self._log.changed("agent", str(error), level="warning")
            self._node.tick()
        else:
            self._metrics.agent_up(True)
            self._log.changed("agent", "")

    def _loop(self) -> None:
        while True:
            self.look()
            if self._stop.wait(AGENT_EVERY_S):
                return


class Reconciler:
    def __init__(self, pods: PodResources, node: Node, log: Log, metrics: Metrics, timing: Timing) -> None:
        self._pods, self._node, self._log, self._metrics = pods, node, log, metrics
        self._settle_s = timing.settle
        self._settled_s: float | None = None
        """since when the kubelet has answered without a break"""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._soon = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="pod-resources", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._soon.set()
        self._thread.join()
        self._pods.close()

    def unsettle(self) -> None:
        """The kubelet has started: what it does not list yet may still be there."""
        self._settled_s = None

    def hurry(self) -> None:
        """Somebody was allocated to: look soon."""
        self._soon.set()

    def look(self, now_s: float) -> None:
        """One look at the kubelet's list. Raises KubeletError."""
        with self._lock:
            try:
                listing = self._pods.listing()
            except NoListError as error:
                self._settled_s = None
                self._metrics.podresources_failed()
                self._log.changed("pod-resources", str(error), level="warning")
                raise KubeletError(str(error)) from error
            self._log.changed("pod-resources", "")
            if self._settled_s is None:
                self._settled_s = now_s
            self._node.reconcile(listing, may_release=now_s - self._settled_s >= self._settle_s)

    def _loop(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(KubeletError):  # said and counted by look
                self.look(time.monotonic())
            self._soon.clear()
            self._soon.wait(LIST_SOON_S if self._node.unowned() else LIST_EVERY_S)
            if self._soon.is_set() and not self._stop.is_set():
                self._stop.wait(LIST_SOON_S / 2)  # the kubelet writes down what it gave after our answer
