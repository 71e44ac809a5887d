# SPDX-License-Identifier: Apache-2.0
"""A process on the fake driver under libvalve, with a test in the place of the agent.

Why it exists: what libvalve captures is compared with what the driver has, call by call, without a gate that
acts on it. Threading model: the test's thread, and one that writes heartbeats.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from fake_agent import FakeAgent, Link

from fakenv import Machine
from valve_agent import wire
from valve_agent.devices.nvidia.table import HOLD_CHANNELS, HOLD_LAUNCHES, Channel, GpuTable

RAW = "import rm, os, threading; c = rm.Client(); t = c.tree(channels=0)"
WAIT_S = 20.0


class Captured:
    """One offline process and the frames that it sends about its GPU."""

    def __init__(self, machine: Machine, library: str | Path, folder: Path, device: wire.Device) -> None:
        """`library`: what to preload."""
        self.machine = machine
        self.agent = FakeAgent(folder / "agent.sock")
        self.files: dict[int, tuple[int, int]] = {}
        """number -> (kind, descriptor)"""
        self.gone: list[int] = []
        self.table: GpuTable | None = None
        self.table_fds: list[int] = []
        """{table, bell}"""
        self.actor = machine.actor(
            "env", f"LD_PRELOAD={library}", f"VALVE_SOCKET={self.agent.path}", "VALVE_WORKLOAD=offline"
        )
        self.link = self.agent.accept()
        self.welcome(device)

    def welcome(self, device: wire.Device = wire.Device.NVIDIA) -> None:
        self.link.welcome(wire.Role.OFFLINE, device=device)
        if device == wire.Device.NVIDIA:
            self.link.expect(wire.GpuTable)
            if self.table is not None:
                self.table.close()
            self.table = GpuTable(self.link.fds[0])
            self._close_table_fds()
            self.table_fds = self.link.fds
            self.table.hold = 0

    def _close_table_fds(self) -> None:
        for fd in self.table_fds:
            os.close(fd)

    def at(self) -> GpuTable:
        assert self.table is not None
        return self.table

    def frames(self, *, take: bool = True, for_s: float = 0.05) -> None:
        """Read what has come; take the files unless told not to."""
        self.link.sock.settimeout(for_s)
        try:
            while True:
                frame, fds = wire.recv(self.link.sock)
                if isinstance(frame, wire.GpuFile):
                    self.files[frame.number] = (frame.kind, fds[0])
                    if take and frame.kind == wire.GpuFileKind.CTL:
                        self.at().take(frame.number)
                elif isinstance(frame, wire.GpuFileGone):
                    self.gone.append(frame.number)
                    os.close(self.files.pop(frame.number)[1])
                    self.at().leave(frame.number)
        except TimeoutError:
            return
        finally:
            self.link.sock.settimeout(WAIT_S)

    def run(self, code: str) -> object:
        """Run code in the process while its files are taken."""
        self.actor.start(code)
        return self.finish()

    def finish(self) -> object:
        deadline = time.monotonic() + WAIT_S
        while not self.answered():
            assert time.monotonic() < deadline, "the process does not answer: a call of it waits"
            self.frames(for_s=0.002)
        result = self.actor.finish()
        self.frames(for_s=0.002)
        return result

    def answered(self) -> bool:
        import select

        return bool(select.select([self.actor._socket], [], [], 0)[0])

    def waits(self, for_s: float = 0.1) -> bool:
        """Whether the call that was started is not over after a while."""
        self.frames(for_s=for_s)
        return not self.answered()

    def let_go(self) -> None:
        self.at().hold = 0
        self.at().wake()

    def hold(self) -> None:
        self.at().hold = HOLD_CHANNELS | HOLD_LAUNCHES

    def channels(self) -> list[Channel]:
        """What the table says, in the order of handles."""
        return sorted(self.at().read()[1], key=lambda channel: channel.channel)

    def driver(self) -> list[tuple[int, int, int]]:
        """(client, channel, engine) as the driver has them."""
        return sorted((c["client"], c["handle"], c["engine"]) for c in self.machine.status()["channels"])

    def agrees(self) -> bool:
        return sorted((c.client, c.channel, c.engine) for c in self.channels()) == self.driver()

    def reconnect(self) -> Link:
        """The agent dies and another one takes its place."""
        for _, fd in self.files.values():
            os.close(fd)
        self.files.clear()
        self.agent.close()
        self.agent.listen()
        self.link = self.agent.accept()
        return self.link

    def close_descriptors(self) -> None:
        """Of the driver: as an agent does at once."""
        for _, fd in self.files.values():
            os.close(fd)
        self.files.clear()

    def close(self) -> None:
        self.actor.close()
        self.agent.close()
        os.close(self.agent.doorbell)
        self._close_table_fds()
        self.close_descriptors()
        if self.table is not None:
            self.table.close()
