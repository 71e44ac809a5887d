# SPDX-License-Identifier: Apache-2.0
"""`valve bench preempt`: from a signal in the online process to offline stopped, beside its floor.

Why it exists: P1 is a promise about this time. The floor is what the machine needs at the least: a bare
futex wake, SIGSTOP and wait, in C. Both run in turns of `--block` cycles in one run, so that whatever else
the machine does falls on both; the ratios are what counts, the microseconds are this machine's.

Caller: cli main, the results page. `main(["--json"])` prints one object; see `run` for its fields.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from valve_cli.bench.arguments import positive
from valve_cli.bench.preempt_rig import Counters, Floor, Ours, Pacing, compile_c, victim_command
from valve_cli.bench.ranks import ranks
from valve_cli.bench.rig import RigError
from valve_cli.run import RunError, default_runtime, find_library

SPINNERS = 2
SLEEPERS = 44
"""A CPU vLLM engine has 46 threads, of which as many compute as there are cores."""
WARMUP_CYCLES = 20


def summary(values_ns: list[int]) -> dict[str, float]:
    """p50, p99 and max in microseconds."""
    return {name: value / 1000 for name, value in ranks(values_ns).items()}


def run(cycles: int, block: int, spinners: int, sleepers: int, libvalve: Path) -> dict[str, Any]:
    """`ours_us` and `floor_us` {p50, p99, max}, `ratio_p50`, `ratio_p99`, `gate_us` (ours from the gate's
    wake-up), `moved` (cycles in which a stopped victim executed; must be 0). Raises RigError."""
    ours_ns: list[int] = []
    gate_ns: list[int] = []
    floor_ns: list[int] = []
    moved = {"ours": 0, "floor": 0}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="valve-bench-")))
        include = _include_folder()
        victim, floor_c, online_c = (
            compile_c(name, folder, include) for name in ("victim", "floor", "online")
        )
        pacing = Pacing()
        sides = []
        for name in ("floor", "ours"):
            counters = Counters(folder / f"{name}.counters", spinners)
            stack.callback(counters.close)
            sides.append((counters, victim_command(victim, counters, sleepers)))
        floor = Floor(floor_c, sides[0][1], sides[0][0], pacing)
        stack.callback(floor.close)
        ours = Ours(online_c, libvalve, sides[1][1], sides[1][0], pacing, folder)
        stack.callback(ours.close)
        floor.block(WARMUP_CYCLES)
        ours.block(WARMUP_CYCLES)
        left = cycles
        while left:
            count = min(block, left)
            left -= count
            latencies, of_gate, moves = ours.block(count)
            ours_ns += latencies
            gate_ns += of_gate
            moved["ours"] += moves
            latencies, moves = floor.block(count)
            floor_ns += latencies
            moved["floor"] += moves
        rest = ours.gate.stats().counters
    ours_us, floor_us = summary(ours_ns), summary(floor_ns)
    return {
        "bench": "preempt",
        "device": "cpu",
        "machine": {"kernel": platform.release(), "cores": os.cpu_count(), "arch": platform.machine()},
        "cycles": cycles,
        "victim_threads": {"spinning": spinners, "sleeping": sleepers},
        "ours_us": ours_us,
        "floor_us": floor_us,
        "gate_us": summary(gate_ns),
        "ratio_p50": ours_us["p50"] / floor_us["p50"],
        "ratio_p99": ours_us["p99"] / floor_us["p99"],
        "over_1ms": {
            "ours": sum(value > 1_000_000 for value in ours_ns) / cycles,
            "floor": sum(value > 1_000_000 for value in floor_ns) / cycles,
        },
        "moved": moved,
        "gate_counters": rest,
    }


def show(report: dict[str, Any], console: Console) -> None:
    threads = report["victim_threads"]
    table = Table(
        title=f"online signal to offline stopped, {report['cycles']} cycles, victim with "
        f"{threads['spinning']} spinning and {threads['sleeping']} sleeping threads (device: cpu)"
    )
    for heading in ("µs", "p50", "p99", "max", "> 1 ms", "moved while stopped"):
        table.add_column(heading, justify="left" if heading == "µs" else "right")
    for name, label in (("ours", "Valve"), ("floor", "floor: futex wake, SIGSTOP, wait (C)")):
        figures = report[f"{name}_us"]
        table.add_row(
            label,
            *(f"{figures[rank]:.0f}" for rank in ("p50", "p99", "max")),
            f"{report['over_1ms'][name]:.2%}",
            str(report["moved"][name]),
        )
    table.add_row("ratio", f"{report['ratio_p50']:.2f}", f"{report['ratio_p99']:.2f}", "", "", "")
    console.print(table)


def main(args: list[str]) -> int:
    """``valve bench preempt [--json] [--cycles N]``. Returns 0; 1 if it could not measure, or a process
    executed while it was said to be stopped."""
    parser = argparse.ArgumentParser(
        prog="valve bench preempt", description="Time from an online request to offline stopped."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--cycles", type=positive, default=10_000, help="of each side (default 10000)")
    parser.add_argument("--block", type=positive, default=250, help="cycles per turn (default 250)")
    parser.add_argument("--spinning", type=positive, default=SPINNERS, help="computing threads of the victim")
    parser.add_argument("--sleeping", type=int, default=SLEEPERS, help="idle threads of the victim")
    parser.add_argument(
        "--runtime", type=Path, default=default_runtime(), help="a bundle made by `make runtime`"
    )
    options = parser.parse_args(args)
    try:
        report = run(
            options.cycles,
            options.block,
            options.spinning,
            options.sleeping,
            find_library(options.runtime),
        )
    except (RigError, RunError) as error:
        print(f"valve bench preempt: {error}", file=sys.stderr)
        return 1
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        show(report, Console())
    return 1 if report["moved"]["ours"] else 0


def _include_folder() -> Path:
    folder = Path(__file__).resolve().parents[3] / "runtime" / "native" / "include"
    if not (folder / "valve_protocol.h").exists():
        raise RigError("the bench needs a source checkout of Valve (runtime/native/include is missing)")
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
