# SPDX-License-Identifier: Apache-2.0
"""``valve bench victims``: what a reclaim costs offline, by the way victims are chosen.

Why it exists: P3 makes a reclaim safe, not cheap.  This compares the agent's choice
(``valve_agent.policy.victims``) with FIFO, LRU and random on the same simulated pools and
prints requests harmed and tokens to recompute per slab reclaimed, and the time per choice.
A simulation (paged_pool.py), one process, one thread, no device: the costs are exact for the
simulated pools and equal for equal seeds; only the times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from valve_agent.policy.baselines import fifo, lru, shuffled
from valve_agent.policy.victims import Choice, SlabView, account, choose
from valve_cli.bench.arguments import positive
from valve_cli.bench.paged_pool import Layout, PagedEngine

LAYOUTS = (
    # name, KV blocks in a column, slabs of a column
    (Layout("2 MiB slabs, small model, a tensor per layer", 85, 30), 32),
    (Layout("32 MiB slabs, 8B model, a tensor per layer", 512, 32), 64),
    (Layout("2 MiB slabs, small model, layers together", 3, 1), 24),
    (Layout("32 MiB slabs, 8B model, layers together", 16, 1), 64),
)
"""Each with the most requests that one engine runs at once: about what its cache holds."""
SLABS = 768
ENGINES = 3
PREFIX_SHARE = 0.3
NEEDS = (16, 64, 128, 256)
WARM_UP_STEPS = 1200
STEPS_BETWEEN = 150
RANDOM_DRAWS = 10

Tokens = Mapping[int, Sequence[int]]
Policy = Callable[[Sequence[SlabView], int, Tokens], Choice]
Pool = tuple[list[SlabView], Tokens]


def pools(layout: Layout, slots: int, snapshots: int, seed: int) -> list[Pool]:
    """Several engines on one device, looked at ``snapshots`` times while they run."""
    columns = SLABS // ENGINES // layout.slabs
    engines = [
        PagedEngine(tenant, layout, columns, slots, PREFIX_SHARE, Random(f"{seed}/{layout.name}/{tenant}"))
        for tenant in range(ENGINES)
    ]
    taken: list[Pool] = []
    for number in range(snapshots):
        for engine in engines:
            engine.run(STEPS_BETWEEN if number else WARM_UP_STEPS)
        views = [view for engine in engines for view in engine.slabs()]
        taken.append((views, {tenant: engine.tokens() for tenant, engine in enumerate(engines)}))
    return taken


def run(*, seed: int = 1, snapshots: int = 5, needs: Sequence[int] = NEEDS) -> dict[str, Any]:
    """Measure.  ``rows``: one for each layout, need and policy, summed over the snapshots."""
    rows = []
    for layout, slots in LAYOUTS:
        taken = pools(layout, slots, snapshots, seed)
        for need in needs:
            for name, policies in _policies(seed).items():
                rows.append(
                    {"layout": layout.name, "need": need, "policy": name, **_measure(policies, taken, need)}
                )
    return {
        "bench": "victims",
        "device": "none (simulated pools)",
        "seed": seed,
        "snapshots": snapshots,
        "slabs": SLABS,
        "engines": ENGINES,
        "prefix_share": PREFIX_SHARE,
        "rows": rows,
    }


def _policies(seed: int) -> dict[str, list[Policy]]:
    def draw(number: int) -> Policy:
        return lambda views, need, tokens: shuffled(views, need, tokens, seed * RANDOM_DRAWS + number)

    return {
        "greedy": [choose],
        "fifo": [fifo],
        "lru": [lru],
        "random": [draw(n) for n in range(RANDOM_DRAWS)],
    }


def _measure(policies: Sequence[Policy], taken: Sequence[Pool], need: int) -> dict[str, float]:
    choices: list[Choice] = []
    times_us: list[float] = []
    requests = sum(len(account(views, tokens).harmed) for views, tokens in taken)
    for views, tokens in taken:
        for policy in policies:
            start_ns = time.perf_counter_ns()
            choices.append(policy(views, need, tokens))
            times_us.append((time.perf_counter_ns() - start_ns) / 1000)
    slabs = sum(len(choice.slabs) for choice in choices)
    times_us.sort()
    return {
        "harmed_per_slab": sum(len(choice.harmed) for choice in choices) / slabs,
        "tokens_per_slab": sum(choice.tokens for choice in choices) / slabs,
        "harmed_share": sum(len(choice.harmed) for choice in choices) / (requests * len(policies)),
        "in_use_share": sum(choice.slabs_in_use for choice in choices) / slabs,
        "choice_us_p50": times_us[len(times_us) // 2],
        "choice_us_max": times_us[-1],
    }


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(
        title=f"Victims: {report['slabs']} slabs, {report['engines']} engines, "
        f"{report['prefix_share']:.0%} of requests share a prefix, seed {report['seed']}"
    )
    table.add_column("layout", overflow="fold")
    for heading in (
        "slabs needed",
        "policy",
        "requests harmed per slab",
        "of all requests",
        "tokens to recompute per slab",
        "slabs in use",
        "µs per choice, p50",
        "max",
    ):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    last = None
    for row in report["rows"]:
        group = (row["layout"], row["need"])
        if group != last:
            table.add_section()
        table.add_row(
            row["layout"] if group != last else "",
            str(row["need"]) if group != last else "",
            row["policy"],
            f"{row['harmed_per_slab']:.2f}",
            f"{row['harmed_share']:.0%}",
            f"{row['tokens_per_slab']:.0f}",
            f"{row['in_use_share']:.0%}",
            f"{row['choice_us_p50']:.0f}",
            f"{row['choice_us_max']:.0f}",
        )
        last = group
    console.print(table)


def main(args: list[str]) -> int:
    """``valve bench victims [--json] [--seed N] [--snapshots N] [--need N ...]``.  Returns 0."""
    parser = argparse.ArgumentParser(
        prog="valve bench victims",
        description="Requests harmed per slab reclaimed, by how victims are chosen.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--seed", type=int, default=1, help="of the simulated pools (default 1)")
    parser.add_argument("--snapshots", type=positive, default=5, help="pools per layout (default 5)")
    parser.add_argument(
        "--need",
        type=positive,
        nargs="+",
        default=list(NEEDS),
        help="slabs per reclaim (default 16 64 128 256)",
    )
    options = parser.parse_args(args)
    report = run(seed=options.seed, snapshots=options.snapshots, needs=options.need)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        show(report, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
