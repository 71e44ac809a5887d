# SPDX-License-Identifier: Apache-2.0
"""When offline may compute: one decision per device, from events and times alone.

Why it exists: P1 and P2 hang on this rule, so it is kept free of effects.  The gate
process feeds it what it read from the online engines' pages and does what it answers.
No I/O, no clock (``now_ns`` is an argument), no threads: one caller, the gate loop.

The rule.  Offline runs if and only if all four hold:

1. no online engine is busy;
2. no hold stands (a reclaim in progress holds offline paused);
3. T_cool has passed since an engine last turned idle or died while busy, where
   T_cool = clamp(cooldown_factor x longest recent decode gap, min, max), fixed at that moment;
4. recovery_grace has passed since the start, and since an engine was lost while busy: engines
   reconnect every 100 ms, and until they did, one that this gate does not know may be busy.

The state is which engines are busy and which holds stand, both sets, so every event is
level-triggered: a repeated or unexpected report changes nothing.  An engine that was never
announced is idle until something says it is busy, and a busy report from it counts.

P2 follows: RESUME is answered only when no engine is busy, and PAUSE only when offline
runs.  A request keeps its engine busy from arrival to end, so no RESUME, and therefore no
second PAUSE, falls between the two (tests/unit/policy/test_gate.py checks it for arbitrary
interleavings).

Longest recent decode gap: the maximum over the idle reports of the last 60 s, over all
engines, dead ones included.  Gaps come from pages that tenants write, hence the bounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from enum import Enum
from math import inf

GAP_WINDOW_NS = 60_000_000_000
"""How long an idle report's decode gap counts: long enough to bridge a lull in online traffic,
short enough that one stall does not lengthen every cooldown for long."""
REJOIN_MAX_NS = 2_000_000_000
"""An engine that was lost is back sooner than a node's engines after an agent's start, and most often it has
ended."""
_GAPS_KEPT = 256  # bounds memory; see _Gaps.add


class Action(Enum):
    """What the caller must do now, before it reports the next event."""

    NONE = "none"
    PAUSE = "pause"
    RESUME = "resume"


class GatePolicy:
    """The gate of one device.

    cooldown_factor: multiple of the longest recent decode gap to wait before offline resumes.
    cooldown_min_ns, cooldown_max_ns: bounds of that wait.
    recovery_grace_ns: how long after ``now_ns``, and up to REJOIN_MAX_NS after a busy engine was
        lost, offline stays paused whatever happens.
    now_ns: the start, on any monotonic clock; every later ``now`` is on the same one.  A
        ``now`` that is older than one already seen is taken as that one.
    offline_paused: False if offline may be running at the start; then the first call, whatever
        it is, answers PAUSE (with a grace of 0 only if rules 1 to 3 forbid running).

    Raises ValueError for a negative duration or factor, or min > max.
    """

    def __init__(
        self,
        cooldown_factor: float,
        cooldown_min_ns: int,
        cooldown_max_ns: int,
        recovery_grace_ns: int,
        now_ns: int,
        offline_paused: bool = True,
    ) -> None:
        self.set_cooldown(cooldown_factor, cooldown_min_ns, cooldown_max_ns)
        if recovery_grace_ns < 0:
            raise ValueError(f"recovery_grace_ns is {recovery_grace_ns}; give at least 0")
        self._now_ns = now_ns
        self._grace_ns = recovery_grace_ns
        self._recovered_ns = now_ns + recovery_grace_ns
        self._cool_ns = now_ns  # when the cooldown in force ends
        self._busy: set[Hashable] = set()
        self._holds: set[Hashable] = set()
        self._gaps = _Gaps()
        self._paused = offline_paused
        self._cooldown_ns = cooldown_min_ns
        self._preemptions = 0
        self._busy_periods = 0

    def set_cooldown(self, cooldown_factor: float, cooldown_min_ns: int, cooldown_max_ns: int) -> None:
        """For cooldowns that begin from now on. Raises ValueError like the constructor."""
        if not 0 <= cooldown_factor < inf:
            raise ValueError(f"cooldown_factor is {cooldown_factor}; give a finite number of at least 0")
        if not 0 <= cooldown_min_ns <= cooldown_max_ns:
            raise ValueError(
                f"cooldown bounds are {cooldown_min_ns} ns and {cooldown_max_ns} ns; "
                "give 0 <= minimum <= maximum"
            )
        self._factor = cooldown_factor
        self._min_ns = cooldown_min_ns
        self._max_ns = cooldown_max_ns

    # -- events; each answers what to do ---------------------------------------------------

    def engine_joined(self, engine: Hashable, busy: bool, now: int) -> Action:
        """An online engine connected or reconnected, and its page says whether it is busy."""
        return self.busy(engine, now) if busy else self.idle(engine, 0, now)

    def busy(self, engine: Hashable, now: int) -> Action:
        """The engine has a request.  Answers PAUSE if offline was running."""
        self._advance(now)
        if engine not in self._busy:
            self._busy.add(engine)
            self._busy_periods += 1
        return self._decide()

    def idle(self, engine: Hashable, decode_gap_ns: int, now: int) -> Action:
        """The engine's last request ended; its longest recent gap between decode iterations.

        From an engine that is not busy this is a repetition and leaves the cooldown alone.
        """
        self._advance(now)
        if engine in self._busy:
            self._busy.remove(engine)
            self._gaps.add(self._now_ns, decode_gap_ns)
            self._start_cooldown()
        return self._decide()

    def missed_busy(self, engine: Hashable, now: int) -> Action:
        """The engine was busy and idle again (its sequence jumped by 2) since the last look.

        Online is active, so the cooldown starts again, and a running offline is paused: rule 3
        holds from the moment the caller learns of it.  The engine's busy state stays as it is.
        """
        self._advance(now)
        self._busy_periods += 1
        self._start_cooldown()
        return self._decide()

    def engine_gone(self, engine: Hashable, now: int) -> Action:
        """The engine died, or lost its connection and will be back with the requests that it has."""
        self._advance(now)
        if engine in self._busy:
            grace_ns = min(self._grace_ns, REJOIN_MAX_NS)
            self._recovered_ns = max(self._recovered_ns, self._now_ns + grace_ns)
        return self.idle(engine, 0, now)

    def hold(self, token: Hashable, now: int) -> Action:
        """Keep offline paused until ``release(token)``.  Holding a token twice is holding it once."""
        self._advance(now)
        self._holds.add(token)
        return self._decide()

    def release(self, token: Hashable, now: int) -> Action:
        """End a hold; a token that is not held is ignored.  A hold starts no cooldown."""
        self._advance(now)
        self._holds.discard(token)
        return self._decide()

    def tick(self, now: int) -> Action:
        """Time has passed.  Never needed before ``deadline_ns()``, harmless at any time."""
        self._advance(now)
        return self._decide()

    # -- what the caller may read ----------------------------------------------------------

    def deadline_ns(self) -> int | None:
        """When the next tick can change something; None while only another event can."""
        if self._busy or self._holds:
            return None if self._paused else self._now_ns
        ready_ns = max(self._cool_ns, self._recovered_ns)
        if self._paused:
            return ready_ns
        return self._now_ns if ready_ns > self._now_ns else None

    @property
    def paused(self) -> bool:
        """Whether offline must not run: what to do with an offline process that attaches now."""
        return self._paused

    @property
    def reason(self) -> str:
        """Why offline is paused: busy, hold, recovering or cooldown; "" when it runs."""
        if not self._paused:
            return ""
        if self._busy:
            return "busy"
        if self._holds:
            return "hold"
        return "recovering" if self._recovered_ns > self._cool_ns else "cooldown"

    @property
    def busy_engines(self) -> frozenset[Hashable]:
        return frozenset(self._busy)

    @property
    def holds(self) -> frozenset[Hashable]:
        return frozenset(self._holds)

    @property
    def cooldown_ns(self) -> int:
        """T_cool as last fixed; the minimum before the first idle."""
        return self._cooldown_ns

    @property
    def preemptions(self) -> int:
        """How often offline went from running to paused, for a request or for a hold."""
        return self._preemptions

    @property
    def busy_periods(self) -> int:
        """How often an engine turned busy, missed periods included."""
        return self._busy_periods

    # -- the rule --------------------------------------------------------------------------

    def _advance(self, now: int) -> None:
        self._now_ns = max(self._now_ns, now)

    def _start_cooldown(self) -> None:
        gap_ns = self._gaps.longest_ns(self._now_ns)
        self._cooldown_ns = min(self._max_ns, max(self._min_ns, round(self._factor * gap_ns)))
        # max: a shorter cooldown, fixed later, must not cut a longer one that is still running
        self._cool_ns = max(self._cool_ns, self._now_ns + self._cooldown_ns)

    def _decide(self) -> Action:
        may_run = (
            not self._busy and not self._holds and self._now_ns >= max(self._cool_ns, self._recovered_ns)
        )
        if may_run == (not self._paused):
            return Action.NONE
        self._paused = not may_run
        if self._paused:
            self._preemptions += 1
            return Action.PAUSE
        return Action.RESUME


class _Gaps:
    """Maximum over a sliding window: the reports not outdone by a later one, oldest first."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, int]] = deque()  # (time, gap); gaps strictly decreasing

    def add(self, now_ns: int, gap_ns: int) -> None:
        """Record a gap; zero and negative ones say that there was none."""
        if gap_ns <= 0:
            return
        while self._kept and self._kept[-1][1] <= gap_ns:
            self._kept.pop()
        self._kept.append((now_ns, gap_ns))
        if len(self._kept) > _GAPS_KEPT:
            # Forget the second newest's time, not its gap: the maximum may live too long, never too short.
            newest_ns, _ = self._kept.pop()
            _, larger_ns = self._kept.pop()
            self._kept.append((newest_ns, larger_ns))

    def longest_ns(self, now_ns: int) -> int:
        """The longest gap reported in the GAP_WINDOW_NS before now; 0 if there was none."""
        while self._kept and now_ns - self._kept[0][0] > GAP_WINDOW_NS:
            self._kept.popleft()
        return self._kept[0][1] if self._kept else 0
