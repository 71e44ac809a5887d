# SPDX-License-Identifier: Apache-2.0
"""An agent on a Kubernetes node: settings from its ColocationNode, tenants from the kubelet, status back.

Why it exists: the adapter between the agent, which knows no cluster, and the cluster. While the API server is
away the agent goes on with the settings it has. One that never had any does not listen at all: online runs
without it (P5), offline waits at its door (P6).

Threading model: made and closed by main; `on_second` in the server thread does everything that touches the
agent. The threads of kube/watch.py, kube/containers.py and kube/report.py only leave values behind; `_sizing`
keeps what the watch leaves in step with the devices. Caller: main.py, through surroundings.Surroundings.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import ValidationError

from valve_agent import live
from valve_agent.identity import Identity
from valve_agent.kube.api import Api
from valve_agent.kube.containers import Containers
from valve_agent.kube.identity import PodIdentity
from valve_agent.kube.ledger import Ledger
from valve_agent.kube.pod_events import PodEvents
from valve_agent.kube.report import NODES_PATH, ConditionValue, Reporter, conditions_of, gpu_of, status_of
from valve_agent.kube.watch import ObjectWatch
from valve_agent.registry import Registry, Tenant
from valve_agent.wire import Role
from valve_api.errors import PolicyError
from valve_api.load import problems_of
from valve_api.model import REQUIRED, ApiModel, setting
from valve_api.names import RESOURCES
from valve_api.node import NodeSpec
from valve_api.settings import EffectiveSettings, settings_from
from valve_kubelet.podresources import PodResources

if TYPE_CHECKING:
    from valve_agent.agent import Agent

SAY_WAITING_S = 30.0
KUBELET_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """One version of the spec: settings, or why it cannot be followed."""

    uid: str
    """Of the object: one that is made anew begins at generation 1 again."""
    generation: int
    settings: tuple[EffectiveSettings, ...]
    """One for every device; none if they cannot be followed."""
    problem: str = ""
    unknown: str = ""
    """Fields that this version does not know, which are left out: the operator may be newer than we are."""

    @property
    def version(self) -> tuple[str, int]:
        return self.uid, self.generation


class _Specified(ApiModel):
    """The part of a ColocationNode that is ours to read: errors name fields as `spec.…`."""

    spec: NodeSpec = setting(REQUIRED, what="Effective settings.")


def wanted_of(node: Mapping[str, Any], sizes: Sequence[int | None] = (None,)) -> Wanted:
    """What a ColocationNode asks for on GPUs of so many bytes (None: on the spec's own cpu device)."""
    uid, generation = version_of(node)
    source = f"ColocationNode {node['metadata'].get('name')}"
    document = {"spec": copy.deepcopy(node.get("spec") or {})}
    unknown = _without_unknown(document)
    try:
        spec = _Specified.model_validate(document).spec
        settings = tuple(settings_from(spec, spec.policy.name, size, source) for size in sizes)
        return Wanted(uid, generation, settings, unknown=unknown)
    except ValidationError as error:
        return Wanted(uid, generation, (), str(PolicyError(source, problems_of(error, _Specified))))
    except PolicyError as error:
        return Wanted(uid, generation, (), str(error))


def _without_unknown(document: dict[str, Any]) -> str:
    """Take fields out that this version does not know, and name them."""
    try:
        _Specified.model_validate(document)
    except ValidationError as error:
        places = [one["loc"] for one in error.errors() if one["type"] == "extra_forbidden"]
    else:
        return ""
    for place in places:
        parent: Any = document
        for step in place[:-1]:
            parent = parent[step]
        del parent[place[-1]]
    return ", ".join(".".join(map(str, place)) for place in places)


def version_of(node: Mapping[str, Any]) -> tuple[str, int]:
    """(uid, generation): changes with the spec, and never with the status."""
    metadata = node["metadata"]
    return str(metadata.get("uid", "")), int(metadata.get("generation", 0))


class KubernetesNode:
    """See the module; implements surroundings.Surroundings."""

    wants_snapshots = True

    def __init__(
        self,
        node: str,
        api: Api,
        pod_resources: Path,
        *,
        logs: Path,
        allocations: Path = Path("/var/lib/valve/device-plugin"),
        cgroups: Path = Path("/sys/fs/cgroup"),
        stderr: TextIO = sys.stderr,
    ) -> None:
        self._node = node
        self._api = api
        self._stderr = stderr
        self._sizing = threading.Lock()
        """Held while `_sizes` or `_object` changes and `_wanted` is made of both, so that the last `_wanted`
        has settings for every device; never while anything is waited for."""
        self._sizes: list[int | None] = []
        """Of the devices, in bytes."""
        self._object: dict[str, Any] | None = None
        """The newest ColocationNode."""
        self._wanted: Wanted | None = None
        self._following: Wanted | None = None
        """The last one that is in force on every device, wholly or but for a restart."""
        self._pending = ""
        """What of it needs a restart."""
        self._conditions: list[Mapping[str, Any]] = []
        self._restart = False
        self._arrived = threading.Event()
        self._watch = ObjectWatch(api, NODES_PATH, node, self._seen)
        self._pod_resources = PodResources(pod_resources, RESOURCES, KUBELET_TIMEOUT_S, patient=False)
        self._containers = Containers(self._pod_resources, logs=logs, cgroups=cgroups)
        self._reporter = Reporter(api, node)
        self._ledger = Ledger(allocations)
        self._pod_events: PodEvents | None = None
        self._identities: list[tuple[Registry, PodIdentity]] = []
        self._agents: Sequence[Agent] = ()

    # Surroundings ---------------------------------------------------------------------------------------

    def settings(self, gpu_bytes: int | None = None) -> EffectiveSettings:
        """Waits until the operator has written settings that hold here; says so while it does."""
        with self._sizing:
            self._sizes.append(gpu_bytes)
            if self._object is not None:
                self._wanted = wanted_of(self._object, tuple(self._sizes))
        if len(self._sizes) == 1:
            self._watch.start()
            self._reporter.start()
        said = 0.0
        while True:
            wanted = self._wanted
            if wanted is not None and len(wanted.settings) == len(self._sizes):
                if self._following is None or self._following.version == wanted.version:
                    self._following = wanted  # else earlier devices have older settings: _follow brings these
                return wanted.settings[-1]
            if self._arrived.wait(0.2):
                self._arrived.clear()
                continue
            if wanted is not None:
                self._report_refused(wanted)
            if time.monotonic() - said > SAY_WAITING_S:
                said = time.monotonic()
                print(f"valve agent: {self._why_waiting(wanted)}", file=self._stderr, flush=True)

    def identity(self, registry: Registry, own_uid: int, device: str) -> Identity[Tenant]:
        def limit_slabs(role: Role, limit_bytes: int) -> int:
            return self._limit_slabs(registry, role, limit_bytes)

        if device:
            self._containers.ledger = self._ledger
        identity = PodIdentity(registry, self._containers, limit_slabs, own_uid=own_uid, device=device)
        registry.offline_roots = identity.offline_roots
        self._identities.append((registry, identity))
        return identity

    def may_ask(self, pid: int) -> bool:
        return self._identities[0][1].is_outsider(pid)

    def start(self, agents: Sequence[Agent], gpu_bytes: Sequence[int | None]) -> None:
        self._agents = agents
        sizes = list(gpu_bytes)
        with self._sizing:
            if sizes != self._sizes and self._object is not None:  # some devices could not be shared
                self._sizes = sizes
                self._wanted = wanted_of(self._object, tuple(self._sizes))
                if self._following is not None and self._following.version == self._wanted.version:
                    self._following = self._wanted
        self._containers.start()
        if agents:
            self._pod_events = PodEvents(self._api, self._node, self._identities[0][1].pod_of)
            self._pod_events.start()
            agents[0].events.listen(self._pod_events.hear)

    def facts(self) -> dict[str, Any]:
        wanted, following = self._wanted, self._following
        return {
            "node": self._node,
            "api_error": self._watch.error or self._reporter.error,
            "kubelet_error": self._containers.view.error,
            "ready": wanted is following and not self._pending,
            "generation": following.generation if following else 0,
            "status_writes": self._reporter.writes,
        }

    def on_second(self, document: Mapping[str, Any]) -> None:
        self._follow()
        for _, identity in self._identities:
            identity.sync()
        if self._restart and not any(live.holds_memory(agent) for agent in self._agents):
            first = self._agents[0]
            first.events.emit("restart", why=f"{self._pending} changed and nobody holds memory")
            first.server.stop()
        grace_s = self._agents[0].settings.recovery_grace_ns / 1e9
        self._report([gpu_of(gpu, grace_s) for gpu in document["gpus"]], document)

    def close(self) -> None:
        if self._pod_events is not None:
            self._pod_events.close()
        self._watch.close()
        self._containers.close()
        self._reporter.close()
        self._pod_resources.close()
        self._api.close()

    # Settings -------------------------------------------------------------------------------------------

    def _seen(self, node: dict[str, Any] | None) -> None:
        """In the watch's thread. An object that is gone changes nothing: the DaemonSet goes with its policy,
        and an object deleted by mistake comes back."""
        if node is None:
            return
        with self._sizing:
            wanted = self._wanted
            if wanted is None:
                self._conditions = (node.get("status") or {}).get("conditions") or []
            self._object = node
            if wanted is None or wanted.version != version_of(node):
                self._wanted = wanted_of(node, tuple(self._sizes) or (None,))
        self._arrived.set()

    def _follow(self) -> None:
        wanted = self._wanted
        if wanted is None or wanted is self._following or not wanted.settings:
            return
        self._following = wanted
        self._pending = ""
        for agent, settings in zip(self._agents, wanted.settings, strict=True):
            pending = live.needs_restart(agent.settings, settings)
            self._pending = self._pending or pending
            live.apply(agent, agent.gate, settings)  # type: ignore[arg-type]
            agent.events.emit(
                "settings", policy=settings.policy, generation=wanted.generation, pending=pending
            )
        self._restart = bool(self._pending)

    def _limit_slabs(self, registry: Registry, role: Role, limit_bytes: int) -> int:
        settings = next((agent.settings for agent in self._agents if agent.registry is registry), None)
        if settings is None:
            return 0
        if role == Role.ONLINE:
            return int(settings.slabs)
        return int(min(limit_bytes // settings.slab_bytes, settings.slabs))

    # Status ---------------------------------------------------------------------------------------------

    def _why_waiting(self, wanted: Wanted | None) -> str:
        if wanted is not None:
            return f"waiting for settings that hold here: {wanted.problem}"
        if self._watch.error:
            return f"waiting for settings: {self._watch.error}"
        return (
            f"waiting for settings: there is no ColocationNode {self._node} yet; the operator makes it when "
            "a ColocationPolicy selects this node"
        )

    def _report_refused(self, wanted: Wanted) -> None:
        ready = ConditionValue("Ready", False, "SettingsRefused", wanted.problem)
        self._submit([], [ready], 0)

    def _report(self, gpus: list[dict[str, Any]], document: Mapping[str, Any]) -> None:
        wanted, following = self._wanted, self._following
        generation = following.generation if following else 0
        ready = ConditionValue("Ready", True, "Following", "")
        if following is not None and following.unknown:
            sentence = f"this agent is older than the operator and does not know {following.unknown}"
            ready = ConditionValue("Ready", True, "FollowingInPart", sentence)
        if wanted is not None and wanted.problem:
            ready = ConditionValue("Ready", False, "SettingsRefused", wanted.problem)
        elif self._pending:
            sentence = f"{self._pending} changes when no tenant of this node holds memory any more"
            ready = ConditionValue("Ready", False, "RestartNeeded", sentence)
        self._submit(gpus, [ready, self._degraded(document)], generation)

    def _degraded(self, document: Mapping[str, Any]) -> ConditionValue:
        why: list[tuple[str, str]] = []
        if self._containers.view.error:
            why.append(("KubeletSilent", self._containers.view.error))
        why += [("GpuUnusable", f"{gpu}: {reason}") for gpu, reason in document["unusable"].items()]
        for gpu in document["gpus"]:
            if not gpu["huge_pages"] and gpu["device"] == "cpu":
                why.append(("SmallPages", "device memory has 4 KiB pages: reclaim is slow"))
            if gpu["growth_stopped"]:
                sentence = f"{gpu['id']}: too many reclaims, so offline gets no more memory for now"
                why.append(("GrowthStopped", sentence))
        if not why:
            return ConditionValue("Degraded", False, "AsExpected")
        return ConditionValue("Degraded", True, why[0][0], "; ".join(sentence for _, sentence in why))

    def _submit(self, gpus: list[dict[str, Any]], values: list[ConditionValue], generation: int) -> None:
        self._conditions = list(conditions_of(values, self._conditions, generation, datetime.now(UTC)))
        self._reporter.submit(status_of(gpus, self._conditions, generation, version("valve")))


def from_arguments(
    node: str,
    kubeconfig: Path | None,
    pod_resources: Path,
    logs: Path,
    allocations: Path,
    environ: Mapping[str, str],
) -> KubernetesNode:
    """Raises KubeError where there is no way to the cluster."""
    from valve_agent.kube import credentials

    server = (
        credentials.from_kubeconfig(kubeconfig, environ=environ)
        if kubeconfig
        else credentials.in_cluster(environ)
    )
    return KubernetesNode(
        node, Api(server, agent=f"valve-agent/{version('valve')}"), pod_resources, logs=logs,
        allocations=allocations,
    )  # fmt: skip
