# SPDX-License-Identifier: Apache-2.0
"""A victim as the tests see it, and a real gate process with pages as main makes them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from valve_agent.gate_link import GateHandle, GateSettings
from valve_agent.shared import Page
from valve_cli.bench.preempt_rig import Counters

SPINNERS = 2
SLEEPERS = 44
SETTINGS = GateSettings(
    cooldown_factor=0, cooldown_min_ns=0, recovery_grace_ns=0, lease_ns=400_000_000, kill_after_ns=10**9
)


@dataclass
class Victim:
    process: subprocess.Popen[bytes]
    counters: Counters
    barrier: bool

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_ns(self) -> int:
        """CPU time of all its threads so far, as the scheduler accounts it."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += int((task / "schedstat").read_text().split()[0])
        return total


class Rig:
    """A real gate process, with pages as main makes them."""

    def __init__(self, settings: GateSettings) -> None:
        self.handle = GateHandle.start("cpu", settings)
        self._pages: list[Page] = []

    def engine(self, conn: int) -> Page:
        fd, page = Page.create()
        self._pages.append(page)
        self.handle.add_engine(conn, os.getpid(), fd)
        os.close(fd)
        return page

    def target(self, conn: int, victim: Victim) -> Page:
        fd, page = Page.create()
        self._pages.append(page)
        pidfd = os.pidfd_open(victim.pid)
        try:
            self.handle.add_target(conn, victim.pid, pidfd, fd, victim.barrier)
        finally:
            os.close(pidfd)
            os.close(fd)
        return page

    def close(self) -> None:
        self.handle.close()
        for page in self._pages:
            page.close()


def end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
