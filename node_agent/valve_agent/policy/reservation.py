# SPDX-License-Identifier: Apache-2.0
"""How much free memory is kept for online's next growth: MIAD, so that reclaims are rare (P4).

Why it exists: a reclaim stops offline and may cost it work, free memory costs nothing but
throughput.  The reservation R is multiplied whenever it was too small and shrinks a little
after every quiet period.  Unit: slabs, integers.  Pure: no I/O, no clock, no threads; the
pool of the device calls it.

The model the bounds speak of.  F <= R is what is free and kept for online; offline holds or
may be granted all that is neither F nor online's.

* Online grows by g <= F: F -= g.  Nothing else happens.
* Online grows by g > F while offline holds something: a *reclaim*.  s = g - F >= 1,
  R = min(max, max(ceil(alpha R), R + s)), and one operation takes s + R slabs from offline:
  afterwards F = R.  If offline holds less, all of it goes, and offline gets memory again only
  once online has freed enough to fill F to R.  So in every case: when a reclaim can happen,
  online has grown by more than the least R since the one before.
* Online frees f: F = min(R, F + f), the rest may go to offline.  After tau without a
  shortfall R = max(min, R - beta), F = min(R, F).

*Demand* is gross growth: what is freed and taken again counts twice.

Burst.  A burst is a stretch without a decrease of R.  Let rho_0 = min and rho_(i+1) =
min(max, max(ceil(alpha rho_i), rho_i + 1)).  The step is monotone, so after i reclaims
R >= rho_i.  The first reclaim needs a demand of 1 (F may be 0), each later one more than the R
that the one before left.  Hence n reclaims need a demand of at least
1 + sum_(0<i<n) (rho_i + 1), and burst_bound(D) is the largest n for which that is <= D.  It is
attained, by growing F + 1 slabs every time.  In closed form:

* for D <= max and min >= 1: n <= max(1, ceil(log_alpha(D / min))), for n > 1 reclaims need
  D > rho_(n-1), which is below max and therefore >= alpha^(n-1) min.  Without "max(1, .)" the
  formula is false: a used-up reserve lets a demand of 1 slab cause a reclaim.
* for any D: n <= max(1, ceil(log_alpha(max / min))) + D / (max + 1).  Once R is at max it can
  grow no more and every max + 1 slabs of demand cost one reclaim: *a demand beyond max is not
  bounded by a logarithm*.  Choose max for the bursts that are to be absorbed.

Long run.  In a time T let d <= T / tau be the decreases.  A reclaim that finds R < max either
leaves R < max, having added at least I = max(1, ceil((alpha - 1) min)), or lands on max, having
added at least 1; between two landings R decreased, so there are at most d + 1 of them.
Everything added was taken away or is still there: at most beta d + max - min.  So of both
kinds there are at most d (1 + (beta - 1) / I) + a constant.  A reclaim that finds R = max comes
less than tau after the shortfall that set it (else R had decreased; min = max aside), with
more than max of demand in between.  Therefore

* if online's demand never exceeds max in a time tau: at most (1 + (beta - 1) / I) / tau
  reclaims per second, whatever else online does (for min = max: they are tau apart at least);
* with a long-run demand of v slabs per second and no such promise: v / (max + 1) more, and
  in any case at most v / (min + 1), as every reclaim needs more than min of demand.

The formula "one reclaim per tau (1 - 1/alpha) R / beta" is false near max, where a reclaim adds
less than (alpha - 1) R: at max, a decrease and a shortfall can alternate every tau.
"""

from __future__ import annotations

from fractions import Fraction
from math import inf


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
        self._set(min_slabs, max_slabs, increase_factor, decrease_slabs, quiet_period_ns)
        self._slabs = min_slabs
        self._mark_ns = now_ns  # the last shortfall or the end of the last quiet period since
        self._now_ns = now_ns

    def _set(self, least: int, most: int, factor: float, decrease: int, quiet_ns: int) -> None:
        if not 0 <= least <= most:
            raise ValueError(f"reservation bounds are {least} and {most} slabs; give 0 <= min <= max")
        if not 1 < factor < inf:
            raise ValueError(f"increase_factor is {factor}; give a finite number above 1")
        if decrease < 1:
            raise ValueError(f"decrease_slabs is {decrease}; give at least 1")
        if quiet_ns < 1:
            raise ValueError(f"quiet_period_ns is {quiet_ns}; give at least 1")
        self.min_slabs = least
        self.max_slabs = most
        self.increase_factor = Fraction(str(factor))
        self.decrease_slabs = decrease
        self.quiet_period_ns = quiet_ns

    def change(
        self,
        *,
        min_slabs: int,
        max_slabs: int,
        increase_factor: float,
        decrease_slabs: int,
        quiet_period_ns: int,
        now: int,
    ) -> int:
        """Other bounds from now on: R moves only as far as they demand. Returns R. Raises ValueError, and
        then nothing has changed."""
        self.tick(now)
        self._set(min_slabs, max_slabs, increase_factor, decrease_slabs, quiet_period_ns)
        self._slabs = min(max_slabs, max(min_slabs, self._slabs))
        return self._slabs

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
        """The most reclaims that a demand of this many slabs can cause in one burst (attained)."""
        left = demand_slabs - 1
        if left < 0:
            return 0
        reclaims, reserve = 1, self._raised(self.min_slabs, 1)
        while left > reserve and reserve < self.max_slabs:
            left -= reserve + 1
            reclaims += 1
            reserve = self._raised(reserve, 1)
        return reclaims + left // (reserve + 1)

    def long_run_bound_per_second(self, growth_slabs_per_second: float | None = None) -> float:
        """The most reclaims per second in the long run (a finite run may have a constant more).

        growth_slabs_per_second: online's long-run demand.  None: any, but never more than
        max_slabs in one quiet period.
        """
        per_second = self._reclaims_per_decrease() * 1e9 / self.quiet_period_ns
        if growth_slabs_per_second is None:
            return per_second
        return min(
            growth_slabs_per_second / (self.min_slabs + 1),
            per_second + growth_slabs_per_second / (self.max_slabs + 1),
        )

    def _reclaims_per_decrease(self) -> float:
        least_raise = max(1, self._raised_unbounded(self.min_slabs) - self.min_slabs)
        return 1 + (self.decrease_slabs - 1) / least_raise

    def _raised(self, slabs: int, shortfall_slabs: int) -> int:
        return min(self.max_slabs, max(self._raised_unbounded(slabs), slabs + shortfall_slabs))

    def _raised_unbounded(self, slabs: int) -> int:
        factor = self.increase_factor
        return -(-slabs * factor.numerator // factor.denominator)
