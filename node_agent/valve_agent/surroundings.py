# SPDX-License-Identifier: Apache-2.0
"""What stands around an agent: where its settings come from, who its tenants are, who hears how it is.

Why it exists: the same agent runs on one machine (a policy file, launchers) and on a Kubernetes node
(kube/node.py: an object that changes, pods, a status to write). The core knows neither.

Threading model: main calls everything; `on_second` in the server thread. Callers: main.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from valve_agent.identity import Identity, LocalIdentity
from valve_agent.registry import Registry, Tenant
from valve_api.load import load_policy
from valve_api.settings import EffectiveSettings, settings_for

if TYPE_CHECKING:
    from valve_agent.agent import Agent


class Surroundings(Protocol):
    def settings(self, gpu_bytes: int | None = None) -> EffectiveSettings:
        """What to start with on a GPU of so many bytes (None: on the policy's own cpu device); may wait.
        Called once for every device. Raises PolicyError, OSError."""
        ...

    def identity(self, registry: Registry, own_uid: int, device: str) -> Identity[Tenant]:
        """Who the tenants of that device are; `device`: its UUID, empty where the machine has one."""
        ...

    def may_ask(self, pid: int) -> bool:
        """Whether a process that reached the status socket may read it."""
        ...

    def start(self, agents: Sequence[Agent], gpu_bytes: Sequence[int | None]) -> None:
        """The agents of all devices are whole and about to run; `gpu_bytes`: as `settings` was asked for."""
        ...

    @property
    def wants_snapshots(self) -> bool:
        """Whether `on_second` looks at what it is given."""
        ...

    def facts(self) -> dict[str, Any] | None:
        """What the snapshot says of the cluster; None: there is none."""
        ...

    def on_second(self, document: Mapping[str, Any]) -> None:
        """Once a second, with the status snapshot."""
        ...

    def close(self) -> None: ...


class OneMachine:
    """A policy file that is read once; tenants are launchers' subtrees."""

    wants_snapshots = False

    def __init__(self, policy: Path | str) -> None:
        self._policy = policy

    def settings(self, gpu_bytes: int | None = None) -> EffectiveSettings:
        return settings_for(load_policy(self._policy), gpu_bytes)

    def identity(self, registry: Registry, own_uid: int, device: str) -> Identity[Tenant]:
        return LocalIdentity(registry.launchers, own_uid)

    def may_ask(self, pid: int) -> bool:
        """The socket's mode says it all."""
        return True

    def start(self, agents: Sequence[Agent], gpu_bytes: Sequence[int | None]) -> None:
        """Nothing has to be started."""

    def facts(self) -> None:
        """There is no cluster."""

    def on_second(self, document: Mapping[str, Any]) -> None:
        """Nobody has to be told."""

    def close(self) -> None:
        """Nothing has to be closed."""
