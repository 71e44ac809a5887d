# SPDX-License-Identifier: Apache-2.0
"""What the tests of a live agent share: the policy, and ways to look at a tenant from outside."""

from __future__ import annotations

import time
from pathlib import Path

from valve_cli.bench.rig import LiveTenant, wait_for

SLAB_BYTES = 2 << 20
SLABS = 64
POLICY = f"""\
apiVersion: valve.io/v1alpha1
kind: ColocationPolicy
metadata: {{name: test}}
spec:
  cpuDevice: {{memory: {SLABS * 2}Mi}}
  compute: {{lease: 400ms, recoveryGrace: 500ms, cooldown: {{min: 20ms, max: 200ms}}}}
  memory:
    slabSize: 2Mi
    onlineFloor: 0%
    reservation: {{min: 2Mi, max: 16Mi, quietPeriod: 60s}}
  offline: {{defaultMemory: 100%}}
"""


def cpu_ticks(pid: int) -> int:
    """CPU time of a process in clock ticks, as the kernel counts it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def runs(pid: int, for_s: float = 0.3) -> bool:
    """Whether the process gets CPU time while we watch. A spinning process gets 30 ticks in this time."""
    before = cpu_ticks(pid)
    time.sleep(for_s)
    return cpu_ticks(pid) > before


def hold(tenant: LiveTenant, slabs: int) -> list[int]:
    """Let it want `slabs` and wait until it has them."""
    tenant.ask("want", slabs=slabs)
    return list(
        wait_for(f"{slabs} slabs", lambda: (h := tenant.ask("poll")["held"]) and len(h) >= slabs and h)
    )


def fill_and_own(
    tenant: LiveTenant, held: list[int], byte: int, requests: int, pinned: list[int]
) -> dict[int, list[int]]:
    """Every slab filled, and owned by one of `requests` requests: slot -> slabs."""
    tenant.ask("fill", slabs=held, byte=byte)
    owned = {slot: held[slot::requests] for slot in range(requests)}
    tokens = {str(slot): 10 * (slot + 1) for slot in owned}
    tenant.ask("own", owned={str(s): slabs for s, slabs in owned.items()}, tokens=tokens, pinned=pinned)
    return owned
