# SPDX-License-Identifier: Apache-2.0
"""`valve bench reclaim`: memory that offline uses, taken from it and mapped in online, timed.

Why it exists: an online request that needs memory waits for exactly this. The agent, the launcher and
libvalve are the real ones; the tenants have no engine, but every slab is filled and owned by requests.

`total` runs from the online process's WANT to the moment it may use all slabs. Its parts are what the agent
says of the same operation: `hold` (offline paused and known to be), `choose` (ledgers read, victims chosen),
`remap` (RECLAIM sent until RECLAIMED came: the helper remapped to the quarantine page), `discard` (pages back
to the machine).

Threading model: one thread. Called by valve_cli.main; `main(["--json"])` prints one object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from valve_cli.bench.ranks import ranks
from valve_cli.bench.rig import LiveAgent, LiveTenant, RigError, wait_for
from valve_cli.run import default_runtime

SLAB_BYTES = 2 << 20
REQUESTS = 32
"""Requests that own the slabs between them."""
PARTS = ("total", "hold", "choose", "remap", "discard")
_POLICY = """\
apiVersion: valve.io/v1alpha1
kind: ColocationPolicy
metadata: {{name: bench-reclaim}}
spec:
  cpuDevice: {{memory: {memory}Mi}}
  compute: {{recoveryGrace: 300ms, cooldown: {{min: 1ms, max: 10ms}}}}
  memory:
    slabSize: 2Mi
    onlineFloor: 0%
    reservation: {{min: 2Mi, max: 2Mi}}
  offline: {{defaultMemory: 100%}}
  guardrails: {{maxReclaimsPerMinute: 60000}}
"""


def run(mib: int, cycles: int, runtime: Path) -> dict[str, Any]:
    """Raises RigError. `times_us`: part -> {p50, p99, max}; `page_bytes` of the offline arena."""
    slabs = mib * (1 << 20) // SLAB_BYTES
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    in_use = 0
    with tempfile.TemporaryDirectory(prefix="valve-bench-") as folder:
        policy = _POLICY.format(memory=(slabs + 1) * SLAB_BYTES >> 20)
        with (
            LiveAgent(Path(folder), policy) as agent,
            LiveTenant(agent.socket, runtime, "offline", name="offline") as offline,
            LiveTenant(agent.socket, runtime, "online", name="online") as online,
        ):
            for tenant in (offline, online):
                tenant.ask("arena", slabs=slabs + 1, slab_bytes=SLAB_BYTES)
            offline.ask("want", slabs=slabs)
            for cycle in range(cycles):
                _cycle(offline, online, slabs, byte=1 + cycle % 250, samples=samples)
                event = agent.wait_event("reclaim", after=cycle)
                in_use += event["bytes_in_use"]
                for part in PARTS[1:]:
                    samples[part].append(event[f"{part}_us"])
                online.ask("want", slabs=0)
                online.ask("return", slabs=list(range(slabs + 1)))
                online.ask("idle")
            huge = agent.status()["huge_pages"]
    return {
        "bench": "reclaim",
        "device": "cpu",
        "machine": {"kernel": platform.release(), "cores": os.cpu_count(), "arch": platform.machine()},
        "mib": mib,
        "cycles": cycles,
        "slab_bytes": SLAB_BYTES,
        "huge_pages": huge,
        "bytes_in_use": in_use,
        "times_us": {part: ranks(values) for part, values in samples.items()},
    }


def _cycle(
    offline: LiveTenant, online: LiveTenant, slabs: int, byte: int, samples: dict[str, list[float]]
) -> None:
    wait_for("offline to hold everything", lambda: len(offline.ask("poll")["held"]) == slabs)
    everything = list(range(slabs + 1))
    held = offline.ask("poll")["held"]
    offline.ask("fill", slabs=held, byte=byte)
    owned = {str(slot): held[slot::REQUESTS] for slot in range(REQUESTS)}
    offline.ask("own", owned=owned, tokens={str(slot): 100 + slot for slot in range(REQUESTS)}, pinned=[])
    online.ask("busy")
    took = online.ask("take", slabs=len(everything))
    if took["held"] != everything:
        raise RigError(f"online got {len(took['held'])} of {len(everything)} slabs")
    samples["total"].append((took["granted_ns"] - took["wanted_ns"]) / 1000)


def show(report: dict[str, Any], console: Console) -> None:
    pages = "2 MiB pages" if report["huge_pages"] else "4 KiB pages: no huge pages to be had"
    table = Table(
        title=f"{report['mib']} MiB in use, offline to online: {report['cycles']} cycles (cpu, {pages})"
    )
    for heading in ("ms", "p50", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    for part, figures in report["times_us"].items():
        table.add_row(part, *(f"{figures[rank] / 1000:.2f}" for rank in ("p50", "p99", "max")))
    console.print(table)


def main(args: list[str]) -> int:
    """Returns 0, or 1 if it could not measure."""
    parser = argparse.ArgumentParser(
        prog="valve bench reclaim",
        description="Memory in use, taken from offline and given to online, timed.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--mib", type=int, default=256, help="memory in use to take, in MiB (default 256)")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--runtime", type=Path, default=default_runtime(), metavar="DIR")
    arguments = parser.parse_args(args)
    try:
        report = run(arguments.mib, arguments.cycles, arguments.runtime.absolute())
    except RigError as error:
        print(f"valve bench reclaim: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(report))
    else:
        show(report, Console())
    return 0
