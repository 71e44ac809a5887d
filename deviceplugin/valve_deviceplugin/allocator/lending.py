# SPDX-License-Identifier: Apache-2.0
"""How much of each GPU offline may be promised, from what its agent says it can lend.

Why it exists: what is lendable moves with every online burst, and the scheduler should see a shrink at once
but no growth that does not stand: a unit that is lent for two seconds only starts a pod that then waits.
Lent is the least that was lendable in the last `stand_s` seconds. Without news for `grace_s`, nothing is
lent.

Threading model: pure; time is an argument. Caller: state.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Report:
    """One GPU as its agent sees it now."""

    id: str
    memory_bytes: int
    lendable_bytes: int
    """most that all offline tenants together could hold now; it may be negative"""
    online_tenants: int
    numa_node: int | None = None

    @property
    def units(self) -> int:
        return self.memory_bytes // GIB

    @property
    def lendable(self) -> int:
        return min(self.units, max(0, self.lendable_bytes) // GIB)


@dataclass
class Lending:
    """What one GPU lends, in GiB."""

    stand_s: float
    grace_s: float
    _samples: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, GiB): times ascending, GiB ascending: each is the least since its predecessor's time"""

    def observe(self, lendable: int, now_s: float) -> None:
        if self._samples and now_s - self._samples[-1][0] > self.grace_s:
            self._samples.clear()  # the agent was away: what it said before counts no more
        while self._samples and self._samples[-1][1] >= lendable:
            self._samples.pop()
        self._samples.append((now_s, lendable))
        while len(self._samples) > 1 and self._samples[0][0] < now_s - self.stand_s:
            self._samples.popleft()

    def lent(self, now_s: float) -> int:
        if not self._samples or now_s - self._samples[-1][0] > self.grace_s:
            return 0
        return self._samples[0][1]
