# SPDX-License-Identifier: Apache-2.0
"""Who computes on the GPU, compared with whom Valve controls.

Why it exists: a process whose channels libvalve did not see (statically linked, loaded past the preload, or
of no tenant at all) would compute while the gate believes the GPU quiet. NVML knows every process with a
context, so it is the judge: an offline process that computes uncontrolled is ended (P6); one of no tenant is
reported, and where the policy refuses unknown processes offline gets no compute while it is there: nobody
could pause it for online, and it is not ours to end.

Threading model: the server thread, once a second. Caller: main.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from valve_agent.registry import Process
from valve_agent.wire import Role

LOOKS = 3
"""Looks in a row before anything is done: a context appears in NVML a moment before its channels do."""


class Parties(Protocol):
    """What the watch needs to know of the agent's processes."""

    def process(self, pid: int) -> Process | None: ...

    def offline_strays(self) -> Iterable[int]:
        """Processes of offline tenants without libvalve."""
        ...

    def role_of(self, pid: int) -> tuple[Role, bool]:
        """(by the tenant it descends from, NONE without one; whether this GPU is that tenant's)."""
        ...

    def ours(self) -> Iterable[int]: ...


@dataclass(frozen=True)
class Finding:
    pid: int
    event: str
    """uncontrolled, wrong-gpu, unknown-process"""
    kill: bool
    """Else the agent only says so."""
    why: str


class GpuWatch:
    def __init__(
        self, processes: Callable[[], Mapping[int, int]], refuse_unknown: Callable[[], bool]
    ) -> None:
        """`processes`: pid -> bytes of GPU memory, of every process with a context. May raise DeviceError.
        `refuse_unknown`: by the settings in force."""
        self.refuses = False
        """Offline must get no compute now."""
        self.unknown = 0
        """Processes of no tenant of this GPU, at the last look."""
        self._processes = processes
        self._refuse_unknown = refuse_unknown
        self._refuse = False
        self._seen: dict[int, int] = {}
        self._told: set[int] = set()

    def look(self, parties: Parties) -> list[Finding]:
        """What is new since the last look; what must be ended is found at every look. Raises DeviceError."""
        found = []
        self._refuse = self._refuse_unknown()
        present = self._processes()
        ours, strays = set(parties.ours()), set(parties.offline_strays())
        self._told &= present.keys()
        suspects = {}
        for pid, used in present.items():
            if pid in ours or pid == os.getpid():
                continue
            finding = self._judge(pid, used, parties, pid in strays)
            if finding is not None:
                suspects[pid] = finding
        self.unknown = sum(not finding.kill for finding in suspects.values())
        self.refuses = self._refuse and self.unknown > 0
        self._seen = {pid: self._seen.get(pid, 0) + 1 for pid in suspects}
        for pid, finding in suspects.items():
            if self._seen[pid] >= LOOKS and (finding.kill or pid not in self._told):
                self._told.add(pid)
                found.append(finding)
        return found

    def _judge(self, pid: int, used: int, parties: Parties, stray: bool) -> Finding | None:
        process = parties.process(pid)
        role, at_home = (process.tenant.role, True) if process is not None else parties.role_of(pid)
        if role == Role.ONLINE and at_home:
            return None
        if role == Role.OFFLINE and not at_home:
            return Finding(
                pid,
                "wrong-gpu",
                True,
                f"it uses {used >> 20} MiB of a GPU that its tenant was not given, where nobody pauses it: "
                "let it see its own GPU only (CUDA_VISIBLE_DEVICES)",
            )
        if role == Role.OFFLINE or stray:
            if process is not None and process.gpu_files:
                return None
            return Finding(
                pid,
                "uncontrolled",
                True,
                f"it uses {used >> 20} MiB of the GPU, but libvalve saw none of its channels, so it cannot "
                "be paused: start it so that libvalve is preloaded (no static libcuda, no RTLD_DEEPBIND)",
            )
        return Finding(
            pid,
            "unknown-process",
            False,
            f"process {pid} uses {used >> 20} MiB of the GPU and belongs to no tenant of it: start it with "
            "`valve run`, or keep it off this GPU"
            + (
                ". Until then offline gets no compute (spec.guardrails.unknownProcesses)"
                if self._refuse
                else ""
            ),
        )
