# SPDX-License-Identifier: Apache-2.0
"""What a tenant process may not do, looked at once a second: use memory that it was not granted, keep memory
without being connected, or compute in its helper.

Why it exists: promise P6. What cannot be accounted for or paused does not share the device.

Threading model: the server thread; each look is a system call or two. Caller: agent.py, which ends the
process when a sentence comes back.
"""

from __future__ import annotations

from valve_agent.identity import cpu_s
from valve_agent.registry import Process
from valve_agent.wire import Role

LOST_NS = 5_000_000_000
"""An offline process with an arena that stays disconnected for so long cannot be accounted for, and nobody
would ever let it go on. A runtime reconnects every 100 ms."""
OVERUSE_SLABS = 1
"""Pages beyond what was granted that are not yet held against a process: one slab, for rounding."""
HELPER_CPU_S = 0.5
"""CPU time within one look (a second or a little more) that no honest helper uses: it remaps, a millisecond
here and there."""


def fault_of_memory(process: Process, resident_bytes: int, slab_bytes: int, now_ns: int) -> str | None:
    """Why this process must not go on, from the pages of its arena; None if it may."""
    memory = process.memory
    if memory is None:
        return None
    granted = memory.holder.count * slab_bytes
    if resident_bytes - granted > OVERUSE_SLABS * slab_bytes:
        return f"it uses {resident_bytes} bytes of its arena where {granted} were granted"
    lost = process.link is None and now_ns - process.lost_ns > LOST_NS
    if lost and process.tenant.role == Role.OFFLINE:
        return f"it has an arena and has not reconnected for {LOST_NS // 1_000_000_000} s"
    return None


def fault_of_helper(process: Process) -> str | None:
    """Why this process must not go on, from the CPU time of its helper, which is never stopped."""
    if process.helper_pid is None:
        return None
    now_s, before_s = cpu_s(process.helper_pid), process.helper_cpu_s
    process.helper_cpu_s = now_s
    if now_s is not None and before_s is not None and now_s - before_s > HELPER_CPU_S:
        return f"its helper {process.helper_pid} computes, and nobody can pause a helper"
    return None
