# SPDX-License-Identifier: Apache-2.0
"""The containers of this node that Valve serves: name, allocation, processes. Refreshed by a thread.

Why it exists: a cgroup says a pod's UID and a container's id; the pod-resources API speaks of namespace, pod
and container names. The kubelet itself joins the two, on this node and without the API server: it makes
/var/log/pods/NAMESPACE_POD_UID/CONTAINER/ before a container starts and, right after, a link
/var/log/containers/POD_NAMESPACE_CONTAINER-ID.log to a file in it.

Nothing here waits for the kubelet on the agent's server thread: that reads what the last look found. A
container that is not known yet is refused with EIDENTITY, for which a runtime tries again every 100 ms, and
`hurry` makes the next look come at once.

Threading model: one thread looks; `view` is replaced whole, so any thread may read it. Callers:
kube/identity.py, kube/node.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from valve_agent.identity import parent_of
from valve_agent.kube import cgroup
from valve_agent.kube.allocation import Allocation, allocations_of
from valve_agent.kube.cgroup import PodCgroup
from valve_agent.kube.ledger import Ledger, LedgerError
from valve_api.container import ContainerName, Listing
from valve_kubelet.podresources import NoListError

LOOK_S = 1.0
HURRY_S = 0.05
"""Least time between two looks, however many unknown processes knock."""
YOUNG_S = 3.0
"""A container's first process counts as its own from this age: before, it is the runtime's, setting up, and
stopping that would hold up the kubelet."""
LOGS = Path("/var/log")


class Lister(Protocol):
    def listing(self) -> Listing: ...


@dataclass(frozen=True, slots=True)
class View:
    """What one look found."""

    allocations: Mapping[ContainerName, Allocation] = field(default_factory=dict)
    names: Mapping[PodCgroup, ContainerName] = field(default_factory=dict)
    """Of every running container that the kubelet has a log for."""
    roots: Mapping[PodCgroup, frozenset[int]] = field(default_factory=dict)
    """Of offline containers: processes whose parent is outside, old enough to be the container's own."""
    gpus: Mapping[ContainerName, tuple[str, ...]] = field(default_factory=dict)
    """UUIDs of each container's GPUs, where the node has several."""
    error: str = ""
    """Why the kubelet or the ledger gave no answer; what it said before is in force."""
    looks: int = 0


def names_in(logs: Path) -> dict[str, tuple[str, ContainerName]]:
    """Container's id -> (pod's UID, name), from the kubelet's links."""
    found: dict[str, tuple[str, ContainerName]] = {}
    folder = logs / "containers"
    try:
        links = os.listdir(folder)
    except OSError:
        return found
    for link in links:
        container_id = link.removesuffix(".log")[-64:]
        try:
            parts = Path(os.readlink(folder / link)).parts[-3:]
        except OSError:
            continue
        if len(parts) != 3 or parts[0].count("_") != 2:
            continue
        namespace, pod, uid = parts[0].split("_")  # none of the three can contain the separator
        found[container_id] = (uid, ContainerName(namespace, pod, parts[1]))
    return found


class Containers:
    def __init__(
        self,
        lister: Lister,
        *,
        logs: Path = LOGS,
        cgroups: Path = Path("/sys/fs/cgroup"),
        proc: Path = Path("/proc"),
        look_s: float = LOOK_S,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`changed` is called, in the thread, after a look that found something new."""
        self.view = View()
        self.ledger: Ledger | None = None
        """Asked where the node has several GPUs."""
        self._lister = lister
        self._logs = logs
        self._cgroups = cgroups
        self._proc = proc
        self._look_s = look_s
        self._changed = changed
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="valve-containers", daemon=True)

    def start(self) -> None:
        """Nobody waits for the first look: the kubelet may be slow, and runtimes try again."""
        self._thread.start()

    def hurry(self) -> None:
        """Somebody is here whom the last look did not know."""
        self._wake.set()

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def look(self) -> None:
        before = self.view
        try:
            allocations: Mapping[ContainerName, Allocation] = allocations_of(self._lister.listing())
            error = ""
        except NoListError as failure:
            allocations, error = before.allocations, str(failure)
        gpus = before.gpus
        if self.ledger is not None:
            try:
                gpus = self.ledger.read()
            except LedgerError as failure:
                error = error or str(failure)
        links = names_in(self._logs)
        names: dict[PodCgroup, ContainerName] = {}
        roots: dict[PodCgroup, frozenset[int]] = {}
        offline = {name for name, allocation in allocations.items() if allocation.offline_units}
        members = cgroup.members(self._cgroups, self._proc) if offline else {}
        for container_id, (uid, name) in links.items():
            place = PodCgroup(uid, container_id)
            names[place] = name
            if name in offline and place in members:
                roots[place] = frozenset(_roots(members[place]))
        view = View(allocations, names, roots, gpus, error, before.looks + 1)
        self.view = view
        if replace(view, looks=0, error="") != replace(before, looks=0, error=""):
            self._changed()

    def _loop(self) -> None:
        try:
            while not self._closing:
                self.look()
                time.sleep(HURRY_S)
                self._wake.wait(self._look_s)
                self._wake.clear()
        finally:  # an error of ours: its traceback is on stderr, and metrics must not say that all is well
            error = "" if self._closing else "nobody looks for pods any more; restart the agent"
            self.view = replace(self.view, error=error)


def _roots(members: set[int]) -> Iterable[int]:
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    for pid in members:
        if parent_of(pid) not in members and now_s - _started_s(pid, now_s) >= YOUNG_S:
            yield pid


def _started_s(pid: int, now_s: float) -> float:
    """Start time in seconds since boot; `now_s` for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (FileNotFoundError, ProcessLookupError):
        return now_s
