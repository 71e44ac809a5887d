# SPDX-License-Identifier: Apache-2.0
"""What the agent of one device asks about those of the machine's other devices.

Why it exists: an agent knows one device; router.py knows them all.

Threading model: the server thread. Callers: agent.py (asks), router.py (answers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from valve_agent.identity import IdentityError
from valve_agent.wire import Role

if TYPE_CHECKING:
    from valve_agent.agent import Agent


class Siblings(Protocol):
    common_doorbell_fd: int
    """What engines on several devices ring."""

    def also_on(self, agent: Agent, pid: int) -> Sequence[Agent]:
        """The other devices of an online process that said HELLO to `agent`."""
        ...

    def role_of(self, agent: Agent, pid: int) -> tuple[Role, bool]:
        """(role by the tenant it descends from, NONE without one; whether this device is the tenant's)."""
        ...


class NoSiblings:
    """Of the only device."""

    common_doorbell_fd = -1

    def also_on(self, agent: Agent, pid: int) -> Sequence[Agent]:
        return ()

    def role_of(self, agent: Agent, pid: int) -> tuple[Role, bool]:
        try:
            return agent.identity.tenant_of(pid).role, True
        except IdentityError:
            return Role.NONE, False
