# SPDX-License-Identifier: Apache-2.0
"""Since when has an offline pod been paused without a break? And which pods move elsewhere?

Agents report now and then, so a pause seen twice may be two pauses. The GPU's counter of preemptions tells:
while it stands still, offline was not resumed in between. An agent that restarts counts from 0, which reads
as a break, as it is one. The table is not stored: after a failover the delay begins anew, which only makes
the operator more patient.

Changed by watch.py when a ColocationNode's status arrives; read by reconcile. No clock: time is an argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause that has not ended. since_s: on the caller's monotonic clock."""

    since_s: float
    preemptions: int


@dataclass(slots=True)
class PausedSince:
    """(node, GPU, tenant) → its pause, for the offline tenants that are paused now."""

    by_node: dict[str, dict[tuple[str, str], Pause]] = field(default_factory=dict)

    def observe(self, node: str, status: Mapping[str, Any], now_s: float) -> None:
        """Takes over what a ColocationNode's status says at `now_s`."""
        before = self.by_node.get(node, {})
        after: dict[tuple[str, str], Pause] = {}
        for gpu in status.get("gpus") or ():
            if not gpu.get("paused"):
                continue
            preemptions = int(gpu.get("preemptions") or 0)
            for tenant in gpu.get("tenants") or ():
                if tenant.get("workload") != "offline" or tenant.get("busy"):
                    continue
                key = (str(gpu.get("id")), str(tenant.get("name")))
                known = before.get(key)
                same = known is not None and known.preemptions == preemptions
                after[key] = known if known and same else Pause(now_s, preemptions)
        if after:
            self.by_node[node] = after
        else:
            self.by_node.pop(node, None)

    def forget(self, node: str) -> None:
        """The node or its ColocationNode is gone."""
        self.by_node.pop(node, None)

    def longer_than(self, node: str, delay_s: float, now_s: float) -> Iterator[tuple[str, float]]:
        """(tenant, seconds) for those of a node that have been paused for `delay_s`; a tenant on several GPUs
        counts with its longest pause. Longest first."""
        longest: dict[str, float] = {}
        for (_, tenant), pause in self.by_node.get(node, {}).items():
            longest[tenant] = max(longest.get(tenant, 0.0), now_s - pause.since_s)
        over = [(tenant, seconds) for tenant, seconds in longest.items() if seconds >= delay_s]
        return iter(sorted(over, key=lambda entry: (-entry[1], entry[0])))
