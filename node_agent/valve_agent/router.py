# SPDX-License-Identifier: Apache-2.0
"""All devices of a machine behind one socket: which Agent a connection belongs to.

Why it exists: a pod finds one socket whatever GPU it was given, and each GPU has an Agent, a pool and a gate
of its own. A connection belongs to one of them from its first frame on: a process to the GPU of its tenant, a
launcher to the first GPU that it lets its command see (CUDA_VISIBLE_DEVICES).

An online tenant may have several GPUs. Its processes belong to the first; the gates of the others know them
as guests, so that one busy signal stops offline on all: they ring a doorbell that every gate hears. An
offline tenant has one.

Threading model: the server thread. Caller: main.py; server.py calls it as its Handler.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from valve_agent import wire
from valve_agent.agent import Agent
from valve_agent.connection import Connection, Kind
from valve_agent.devices.base import DeviceInfo
from valve_agent.identity import IdentityError, ancestors
from valve_agent.wire import RejectCode, Role

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECOND_NS = 1_000_000_000


class Router:
    """See the module; implements server.Handler and siblings.Siblings."""

    def __init__(
        self,
        agents: Sequence[Agent],
        devices: Sequence[DeviceInfo],
        on_second: Callable[[], None],
        *,
        common_doorbell_fd: int = -1,
        proc: Path = Path("/proc"),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`devices`: of the agents, in the same order. `on_second`: once a second, for what concerns all."""
        self.agents = tuple(agents)
        self.common_doorbell_fd = common_doorbell_fd
        self._devices = tuple(devices)
        self._on_second = on_second
        self._proc = proc
        self._clock = clock
        self._second_ns = 0
        self._home: dict[int, Agent] = {}
        """Connection -> whose it is."""
        self._launchers: dict[int, tuple[Agent, ...]] = {}
        """Launcher's pid -> the agents of its GPUs, its own first."""

    # Handler ----------------------------------------------------------------------------------------

    def on_frame(self, connection: Connection, frame: wire.Frame, fds: list[int]) -> None:
        agent = self._home.get(connection.id)
        if agent is None:
            agent = self._choose(connection, frame)
            self._home[connection.id] = agent
        agent.on_frame(connection, frame, fds)

    def on_closed(self, connection: Connection, why: str) -> None:
        self._home.pop(connection.id, self.agents[0]).on_closed(connection, why)

    def on_protocol_error(self, connection: Connection, error: Exception) -> None:
        self._home.get(connection.id, self.agents[0]).on_protocol_error(connection, error)

    def on_turn(self) -> None:
        for agent in self.agents:
            agent.on_turn()
        now = self._clock()
        if now - self._second_ns >= SECOND_NS:
            self._second_ns = now
            self._launchers = {
                pid: agents for pid, agents in self._launchers.items() if pid in agents[0].registry.launchers
            }
            self._on_second()

    def deadline_ns(self) -> int | None:
        times = [agent.deadline_ns() for agent in self.agents]
        return min([self._second_ns + SECOND_NS, *(when for when in times if when is not None)])

    # Siblings ---------------------------------------------------------------------------------------

    def also_on(self, agent: Agent, pid: int) -> Sequence[Agent]:
        return [other for other in self._agents_of(pid) if other is not agent]

    def role_of(self, agent: Agent, pid: int) -> tuple[Role, bool]:
        agents = self._agents_of(pid)
        try:
            return agents[0].identity.tenant_of(pid).role, agent in agents
        except (IndexError, IdentityError):  # of no tenant, or gone meanwhile
            return Role.NONE, False

    # Whose it is ------------------------------------------------------------------------------------

    def _choose(self, connection: Connection, frame: wire.Frame) -> Agent:
        """Raises IdentityError."""
        pid = connection.peer.pid
        if len(self.agents) == 1:
            return self.agents[0]
        if isinstance(frame, wire.Tenant):
            agents = self._visible_to(pid)
            ids = ", ".join(device.uuid for device in self._devices)
            if len(agents) > 1 and frame.role != Role.ONLINE:
                raise IdentityError(
                    RejectCode.EPERM,
                    f"an offline tenant has one GPU: set {VISIBLE} to one of {ids} for `valve run`",
                )
            self._launchers[pid] = agents
            return agents[0]
        if isinstance(frame, wire.MemoryOpen):
            known = [agent for agent in self.agents if pid in agent.registry.processes]
            return known[0] if known else self.agents[0]
        if connection.kind is Kind.NEW:
            serving = self._agents_of(pid)
            if serving:
                return serving[0]
        return self.agents[0]  # which refuses it, and says why

    def _agents_of(self, pid: int) -> tuple[Agent, ...]:
        """Of the GPUs of the tenant that a process belongs to; none for a process of no tenant."""
        serving = tuple(agent for agent in self.agents if agent.identity.serves(pid))
        if len(serving) != 1:
            return serving
        for ancestor in ancestors(pid):
            if ancestor in serving[0].registry.launchers:
                return self._launchers.get(ancestor, serving)
        return serving

    def _visible_to(self, pid: int) -> tuple[Agent, ...]:
        """The GPUs that a launcher's environment names, in that order; the first of the machine where it
        names none. Raises IdentityError for one that is not shared here."""
        words = self._environment(pid).get(VISIBLE, "").split(",")
        found = []
        for word in filter(None, (word.strip() for word in words)):
            matches = [
                agent
                for agent, device in zip(self.agents, self._devices, strict=True)
                if word == str(device.number) or (word.startswith("GPU-") and device.uuid.startswith(word))
            ]
            if len(matches) != 1:
                raise IdentityError(
                    RejectCode.EPERM,
                    f"{VISIBLE}={','.join(words)}: {word} is none of the GPUs that this agent shares: "
                    + ", ".join(f"{device.number} ({device.uuid})" for device in self._devices),
                )
            found += [agent for agent in matches if agent not in found]
        return tuple(found) or self.agents[:1]

    def _environment(self, pid: int) -> dict[str, str]:
        try:
            data = (self._proc / str(pid) / "environ").read_bytes()
        except OSError:  # it is gone, or not ours to read: as if it said nothing
            return {}
        pairs = (os.fsdecode(entry).partition("=") for entry in data.split(b"\0") if entry)
        return {name: value for name, _, value in pairs}
