# SPDX-License-Identifier: Apache-2.0
"""How much free memory is kept for online's next growth: MIAD, so that reclaims are rare (P4).

Why it exists: a reclaim stops offline and may cost it work, free memory costs nothing but
throughput.  The reservation R doubles (or so) whenever it was too small and shrinks a little
after every quiet period.  Unit: slabs, integers.  Pure: no I/O, no clock, no threads; the
pool of the device calls it.
"""

from __future__ import annotations

from fractions import Fraction


class Reservation:
    """R for one device, min_slabs <= R <= max_slabs, starting at min_slabs.

    increase_factor: alpha > 1; its decimal meaning is used, so 1.1 is exactly 11/10.
    decrease_slabs: beta >= 1, what a quiet period takes away.
    quiet_period_ns: tau > 0; a quiet period has no shortfall in it.
    now_ns: the start, on any monotonic clock; an older ``now`` later is taken as the last one.

    Raises ValueError for values outside these ranges.
    """

    def __init__(
        self,
        *,
        min_slabs: int,
        max_slabs: int,
        increase_factor: float,
        decrease_slabs: int,
        quiet_period_ns: int,
        now_ns: int,
    ) -> None:
        if not 0 <= min_slabs <= max_slabs:
            raise ValueError(
                f"reservation bounds are {min_slabs} and {max_slabs} slabs; give 0 <= min <= max"
            )
        if not increase_factor > 1:
            raise ValueError(f"increase_factor is {increase_factor}; give a number above 1")
        if decrease_slabs < 1:
            raise ValueError(f"decrease_slabs is {decrease_slabs}; give at least 1")
        if quiet_period_ns < 1:
            raise ValueError(f"quiet_period_ns is {quiet_period_ns}; give at least 1")
        self.min_slabs = min_slabs
        self.max_slabs = max_slabs
        self.increase_factor = Fraction(str(increase_factor))
        self.decrease_slabs = decrease_slabs
        self.quiet_period_ns = quiet_period_ns
        self._slabs = min_slabs
        self._mark_ns = now_ns  # the last shortfall or the end of the last quiet period since
        self._now_ns = now_ns

    @property
    def slabs(self) -> int:
        """R as of the last call."""
        return self._slabs

    def on_shortfall(self, shortfall_slabs: int, now: int) -> int:
        """Online needs ``shortfall_slabs`` more than was free: reclaim them and refill to the new R.

        Returns the new R.  Raises ValueError if shortfall_slabs < 1.
        """
        if shortfall_slabs < 1:
            raise ValueError(f"a shortfall of {shortfall_slabs} slabs is none; report at least 1")
        self.tick(now)
        self._slabs = self._raised(self._slabs, shortfall_slabs)
        self._mark_ns = self._now_ns
        return self._slabs

    def tick(self, now: int) -> int:
        """Let time pass: R -= beta for every quiet period that ended, down to min.  Returns R."""
        self._now_ns = max(self._now_ns, now)
        periods = (self._now_ns - self._mark_ns) // self.quiet_period_ns
        self._mark_ns += periods * self.quiet_period_ns
        self._slabs = max(self.min_slabs, self._slabs - periods * self.decrease_slabs)
        return self._slabs

    def deadline_ns(self) -> int | None:
        """When the next tick can lower R; None when R is at its minimum."""
        return self._mark_ns + self.quiet_period_ns if self._slabs > self.min_slabs else None

    def burst_bound(self, demand_slabs: int) -> int:
        """The most reclaims that ``demand_slabs`` of growth can cause in one burst."""
        raise NotImplementedError

    def long_run_bound_per_second(self, growth_slabs_per_second: float | None = None) -> float:
        """The most reclaims per second over a long time."""
        raise NotImplementedError

    def _raised(self, slabs: int, shortfall_slabs: int) -> int:
        scaled = -(-slabs * self.increase_factor.numerator // self.increase_factor.denominator)
        return min(self.max_slabs, max(scaled, slabs + shortfall_slabs))
