# SPDX-License-Identifier: Apache-2.0
"""Whose process is it, on a Kubernetes node: the pod that its cgroup says, with the role and limit that the
kubelet allocated.

Why it exists: here a tenant is a container of a pod, not a launcher's subtree. Launchers are refused: root
in a container is root to SO_PEERCRED, and would choose its own role.

Threading model: the server thread only; it reads one file of /proc and the last look of kube/containers.py,
and never waits for the kubelet. Callers: agent.py (Identity), kube/node.py (`sync`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from valve_agent.identity import IdentityError, LocalIdentity, Peer
from valve_agent.kube import cgroup
from valve_agent.kube.allocation import Allocation
from valve_agent.kube.cgroup import NotInPod
from valve_agent.kube.containers import Containers
from valve_agent.kube.pod_events import Pod
from valve_agent.registry import Registry, Tenant
from valve_agent.wire import RejectCode, Role
from valve_api.container import ContainerName
from valve_api.names import ANNOTATION_WORKLOAD, RESOURCE_OFFLINE_MEMORY, RESOURCE_ONLINE_GPU


@dataclass(frozen=True, slots=True)
class Key:
    """What makes a tenant: a container of one pod, over its restarts."""

    uid: str
    name: ContainerName


class PodIdentity(LocalIdentity[Tenant]):
    """Tenants are containers; a helper still speaks for its process as on any machine."""

    def __init__(
        self,
        registry: Registry,
        containers: Containers,
        limit_slabs: Callable[[Role, int], int],
        *,
        own_uid: int,
        device: str = "",
        proc: Path = Path("/proc"),
    ) -> None:
        """`limit_slabs(role, bytes)`: most slabs under the settings in force. `device`: only containers on
        the GPU of that UUID; empty: the node has one, and all are on it."""
        super().__init__(registry.launchers, own_uid)
        self._registry = registry
        self._containers = containers
        self._limit_slabs = limit_slabs
        self._device = device
        self._proc = proc
        self._tenants: dict[Key, Tenant] = {}

    def may_register(self, peer: Peer) -> bool:
        return False

    def tenant_of(self, pid: int) -> Tenant:
        try:
            place = cgroup.of_process(pid, self._proc)
        except NotInPod as error:
            raise IdentityError(
                RejectCode.EIDENTITY,
                f"{error}: this agent serves the pods of its node. On a machine without Kubernetes run "
                "`valve agent --policy FILE`",
            ) from error
        view = self._containers.view
        name = view.names.get(place)
        if name is None:
            self._containers.hurry()
            raise IdentityError(
                RejectCode.EIDENTITY,
                f"container {place.container[:12]} of pod {place.uid} is not known yet: the kubelet has not "
                "linked its log. If this stays, the agent does not see the host's /var/log",
            )
        allocation = view.allocations.get(name)
        if allocation is None:
            self._containers.hurry()
            why = f" (the kubelet does not answer: {view.error})" if view.error else ""
            raise IdentityError(
                RejectCode.EIDENTITY,
                f"container {name} has no {RESOURCE_ONLINE_GPU} or {RESOURCE_OFFLINE_MEMORY} from the "
                f"kubelet{why}: annotate the pod with {ANNOTATION_WORKLOAD}: online or offline when you "
                "create it",
            )
        if not self._is_here(name):
            self._containers.hurry()
            gpus = view.gpus.get(name)
            raise IdentityError(
                RejectCode.EIDENTITY,
                f"container {name} is on {', '.join(gpus)}, not on {self._device}"
                if gpus
                else f"container {name} is on a GPU that the agent does not know yet"
                + (f": {view.error}" if view.error else ""),
            )
        return self._tenant(Key(place.uid, name), allocation)

    def serves(self, pid: int) -> bool:
        """By the last look; nobody is registered and nothing hurried for a mere question."""
        try:
            place = cgroup.of_process(pid, self._proc)
        except NotInPod:
            return False
        name = self._containers.view.names.get(place)
        if name is None or not self._is_here(name):
            return False
        allocation = self._containers.view.allocations.get(name)
        return allocation is not None and allocation.role is not None

    def is_outsider(self, pid: int) -> bool:
        """Not a process of a container that Valve serves, nor of one that is not known yet: those have the
        agent's folder mounted, and root in a container passes every file mode."""
        if pid <= 0:
            return False
        try:
            name = self._containers.view.names.get(cgroup.of_process(pid, self._proc))
        except NotInPod:
            return True
        if name is None:
            self._containers.hurry()
        return name is not None and name not in self._containers.view.allocations

    def pod_of(self, pid: int) -> Pod | None:
        """Whose container a process is in, Valve's or not; None for one of no pod that is known."""
        try:
            place = cgroup.of_process(pid, self._proc)
        except NotInPod:
            return None
        name = self._containers.view.names.get(place)
        return None if name is None else Pod(place.uid, name.namespace, name.pod, name.container)

    def sync(self) -> None:
        """Once a second: every allocated container that runs is a tenant, attached or not; one that is gone
        and has no processes left is none. Limits follow the settings."""
        view = self._containers.view
        seen: set[Key] = set()
        for place, name in view.names.items():
            allocation = view.allocations.get(name)
            if allocation is None or allocation.role is None or not self._is_here(name):
                continue
            key = Key(place.uid, name)
            seen.add(key)
            self._tenant(key, allocation)
        for key in self._tenants.keys() - seen:
            if self._registry.release(self._tenants[key]):
                del self._tenants[key]

    def offline_roots(self) -> Iterable[int]:
        """Processes of offline containers from which the scan starts (Registry.offline_roots)."""
        view = self._containers.view
        for place, roots in view.roots.items():
            if self._is_here(view.names[place]):
                yield from roots

    def _is_here(self, name: ContainerName) -> bool:
        return not self._device or self._device in self._containers.view.gpus.get(name, ())

    def _tenant(self, key: Key, allocation: Allocation) -> Tenant:
        role = allocation.role
        if role is None:
            raise IdentityError(
                RejectCode.EROLE,
                f"container {key.name} has both {RESOURCE_ONLINE_GPU} and {RESOURCE_OFFLINE_MEMORY}: request "
                "one of them",
            )
        limit = self._limit_slabs(role, allocation.offline_bytes)
        tenant = self._tenants.get(key)
        if tenant is not None and tenant.id in self._registry.tenants:
            tenant.kept = True
            tenant.limit_slabs = limit
            return tenant
        labels = {"namespace": key.name.namespace, "pod": key.name.pod, "container": key.name.container}
        tenant = self._registry.register_pod(self._name(key), role, limit, labels)
        self._tenants[key] = tenant
        return tenant

    def _name(self, key: Key) -> str:
        """namespace/pod; with the container where the pod has several that Valve serves."""
        name = key.name
        several = sum(
            (other.namespace, other.pod) == (name.namespace, name.pod)
            for other in self._containers.view.allocations
        )
        return str(name) if several > 1 else f"{name.namespace}/{name.pod}"
