# SPDX-License-Identifier: Apache-2.0
"""The list of parts: name, question, how often, how long at most.

Threading model: values. Caller: qualify.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qualification import ends, endure, evict, reach, reclaim, remap, serving, tails
from qualification.machine import Machine, Tools
from qualification.record import Found
from qualification.xids import KILLED, XidWatch

Run = Callable[[Machine, Tools, int], Found]
LIMIT_S = 150.0
"""Of a part that is about correctness: on a GPU each is believed to take half a minute at most."""


@dataclass(frozen=True)
class Part:
    name: str
    question: str
    call: Run
    count: int
    """Cycles on a GPU at scale 1."""
    fake: int
    """And on the fake driver, where only the path is of interest."""
    limit_s: float = LIMIT_S

    def run(self, machine: Machine, tools: Tools, scale: float) -> Found:
        count = max(1, round((self.fake if machine.is_fake else self.count) * scale))
        with XidWatch() as xids:
            found = self.call(machine, tools, count)
            seen = xids.seen()
        found.figures["xids"] = seen
        found.notes += tools.clock.notes
        if machine.assumed:
            found.notes.append(machine.assumed)
        if xids.problem:
            found.notes.append(f"Xids were not watched: {xids.problem}")
        unexpected = [xid for xid in seen if xid not in (KILLED, *found.expected_xids)]
        if unexpected and found.verdict in ("pass", "finding"):
            found.verdict = "fail"
            found.answer += f"; but Xid {unexpected} was reported"
        return found


PARTS = {
    part.name: part
    for part in (
        Part("e1", "Does DISABLE_CHANNELS alone evict a running kernel?", evict.e1, 200, 5),
        Part("e2", "All channels of the group, or the launching one only?", evict.e2, 1, 1),
        Part("e3", "Is PREEMPT or RESTART_RUNLIST needed, and what does each step cost?", evict.e3, 1000, 5),
        Part(
            "e4",
            "Does a kernel go on in the middle, with the right result, 10,000 times?",
            endure.e4,
            10_000,
            20,
        ),
        Part("e5", "Are long pauses harmless? (seconds)", endure.e5, 120, 1, limit_s=200),
        Part("e6", "What of a flood of launches into a paused process?", endure.e6, 100_000, 400),
        Part("e7", "Who may control whose channels?", reach.e7, 1, 1),
        Part("e8", "Does libcuda remap in a paused process, or wait?", remap.e8, 1, 1),
        Part("e9", "SPARSE below libcuda: what is read, what is stored, what does it cost?", remap.e9, 1, 1),
        Part("e10", "How long does a pause wait behind an allocating neighbour?", tails.e10, 2000, 10),
        Part("e11", "Copies in flight while paused?", remap.e11, 10, 2),
        Part("e12", "What stays behind after deaths while paused?", ends.e12, 1, 1),
        Part("e13", "Graphs, new streams, contexts, more than 64 channels?", ends.e13, 1, 1),
        Part("e14", "What does an online process feel?", tails.e14, 50, 1),
        Part("e15", "Which controls does this machine answer?", reach.e15, 1, 1),
        Part("e16", "At which points can a kernel be preempted?", evict.e16, 1, 1),
        Part(
            "preempt",
            "Signal to evicted, by route, idle and beside an allocating neighbour",
            tails.preempt,
            10_000,
            20,
            limit_s=330,
        ),
        Part(
            "reclaim",
            "Reclaim and restore by slab size, against 2 MiB pages",
            reclaim.reclaim,
            20,
            2,
            limit_s=240,
        ),
        Part(
            "serving",
            "TTFT, TPOT and offline tokens/s, against the alternatives",
            serving.serving,
            15,
            2,
            limit_s=450,
        ),
    )
}

ORDER = (
    "e15", "e16", "e1", "e2", "e3", "e7", "e4", "preempt", "e8", "e9", "reclaim", "e6", "e11", "e13", "e14",
    "serving", "e10", "e12", "e5",
)  # fmt: skip
"""In which all parts are run: what the design rests on first, and late what may harm the driver or only takes
long."""
assert sorted(ORDER) == sorted(PARTS)
