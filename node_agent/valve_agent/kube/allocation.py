# SPDX-License-Identifier: Apache-2.0
"""What each container of the node may use, from the ids that the kubelet has given to it.

Why it exists: a pod's role and memory limit are what the scheduler and the kubelet accounted for, not what
its processes claim. Pure; called by kube/containers.py with the kubelet's pod-resources list.
"""

from __future__ import annotations

from dataclasses import dataclass

from valve_agent.wire import Role
from valve_api.container import ContainerName, Listing
from valve_api.names import OFFLINE_MEMORY_UNIT_BYTES, RESOURCES


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one container got of Valve's resources."""

    online_seats: int = 0
    offline_units: int = 0
    device_ids: tuple[str, ...] = ()
    """As the device plugin named them; its ledger says which GPU they are on."""

    @property
    def role(self) -> Role | None:
        """None if it has both kinds: admission does not let that happen, and we do not guess."""
        if self.online_seats and self.offline_units:
            return None
        return Role.ONLINE if self.online_seats else Role.OFFLINE

    @property
    def offline_bytes(self) -> int:
        return self.offline_units * OFFLINE_MEMORY_UNIT_BYTES


def allocations_of(listing: Listing) -> dict[ContainerName, Allocation]:
    """One entry for every container that has something of Valve's."""
    found: dict[ContainerName, Allocation] = {}
    for name in {name for _, name in listing}:
        online, offline = (listing.get((resource, name), frozenset()) for resource in RESOURCES)
        found[name] = Allocation(len(online), len(offline), tuple(sorted(online | offline)))
    return found
