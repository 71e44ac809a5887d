# SPDX-License-Identifier: Apache-2.0
"""An agent for the tests of GPU memory: the real one but for the gate, which pauses by raw RM calls on the
victims' own control files. Run under a fake machine; argv is a JSON object (memory_rig.py says what is in
it).

Prints "ready", then answers one JSON line per line on stdin: {"ask": "state"}.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

CONFIG = json.loads(sys.argv[1])
sys.path[:0] = CONFIG["path"]

import rm as raw  # noqa: E402

from valve_agent import sockets  # noqa: E402
from valve_agent.agent import Agent  # noqa: E402
from valve_agent.devices.nvidia import rm  # noqa: E402
from valve_agent.devices.nvidia.cuda_driver import CudaDriver  # noqa: E402
from valve_agent.devices.nvidia.memory import NvidiaMemoryPool  # noqa: E402
from valve_agent.devices.nvidia.physical import PhysicalSlabs  # noqa: E402
from valve_agent.devices.nvidia.uvm import Mapper  # noqa: E402
from valve_agent.events import EventLog  # noqa: E402
from valve_agent.identity import LocalIdentity  # noqa: E402
from valve_agent.main import make_pool  # noqa: E402
from valve_agent.registry import Registry  # noqa: E402
from valve_agent.server import Server  # noqa: E402
from valve_agent.shared import Page  # noqa: E402
from valve_agent.slab_moves import SlabMoves  # noqa: E402
from valve_agent.wire import Device, MemoryRoute  # noqa: E402
from valve_api.load import load_policy  # noqa: E402
from valve_api.settings import settings_for  # noqa: E402


def machine_status() -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.connect(CONFIG["machine"])
        link.send(b"status")
        answer: dict[str, Any] = json.loads(link.recv(1 << 20))
    return answer


def pause(pids: set[int], on: bool) -> None:
    """Disable (or enable) every channel of these processes, through their own open files."""
    status = machine_status()
    inodes = {file["inode"] for file in status["files"] if file["kind"] == "ctl"}
    for entry in status["clients"]:
        channels = [c["handle"] for c in status["channels"] if c["client"] == entry["handle"]]
        if entry["pid"] not in pids or not channels:
            continue
        for name in os.listdir(f"/proc/{entry['pid']}/fd"):
            if os.stat(f"/proc/{entry['pid']}/fd/{name}").st_ino not in inodes:
                continue
            pidfd = os.pidfd_open(entry["pid"])
            fd = pidfd_getfd(pidfd, int(name))
            client = raw.Client(fd=fd, handle=entry["handle"])
            probe = client.control(entry["handle"], 0x201, bytes(128))[0]
            if probe != raw.INVALID_CLIENT:
                result = client.disable(raw.subdevice_of(client), channels, on=on)
                assert result == raw.OK, hex(result)
            os.close(fd)
            os.close(pidfd)


def pidfd_getfd(pidfd: int, number: int) -> int:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(438, pidfd, number, 0)
    assert fd >= 0, ctypes.get_errno()
    return int(fd)


class TestGate:
    """Open except under a hold. `lies`: answers a hold without pausing anybody."""

    def __init__(self) -> None:
        self.doorbell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._targets: dict[int, int] = {}
        self._pages: dict[int, Page] = {}
        self._tables: dict[int, mmap.mmap] = {}
        self._holds = 0
        self.held_ns: list[int] = []
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            for page in list(self._pages.values()):
                page.heartbeat_ns = time.monotonic_ns()
            time.sleep(0.02)

    def add_engine(self, conn: int, pid: int, page_fd: int) -> None:
        self._pages[conn] = Page(page_fd)

    def add_target(self, conn: int, pid: int, pidfd: int, page_fd: int, barrier: bool) -> None:
        self._pages[conn] = Page(page_fd)
        self._targets[conn] = pid

    def remove(self, conn: int) -> None:
        self._targets.pop(conn, None)
        self._pages.pop(conn, None)

    def supply(self, conn: int, number: int, fds: list[int]) -> None:
        """Let it make channels: pauses here find their own way to them."""
        if number < 0:
            self._tables[conn] = mmap.mmap(fds[0], 0)
            self._tables[conn][8:12] = bytes(4)  # hold
        else:
            taken = int.from_bytes(self._tables[conn][12:16], "little") | 1 << number
            self._tables[conn][12:16] = taken.to_bytes(4, "little")

    def withdraw(self, conn: int, number: int) -> None:
        pass

    def set_scanned(self, pids: dict[int, int]) -> None:
        pass

    def hold(self, timeout_s: float) -> None:
        self._holds += 1
        if self._holds == 1:
            pause(set(self._targets.values()), True)
        self.held_ns.append(time.monotonic_ns())

    def release(self) -> None:
        self._holds -= 1
        if self._holds == 0:
            pause(set(self._targets.values()), False)

    def fileno(self) -> int:
        return self._events

    def read_events(self) -> list[dict[str, Any]]:
        return []


def main() -> None:
    settings = settings_for(load_policy(Path(CONFIG["policy"])), CONFIG["bytes"])
    settings = dataclasses.replace(settings, recovery_grace_ns=CONFIG.get("grace_ns", 0))
    server = Server(sockets.listen(Path(CONFIG["socket"]), 0o666))
    registry = Registry()
    events = EventLog(Path(CONFIG["events"]), sys.stderr)
    branch = rm.branch_of(rm.driver_version() or "")
    assert branch is not None
    driver = CudaDriver()
    gpu = driver.uuid(0)
    physical = PhysicalSlabs(
        driver, 0, settings.slab_bytes, settings.slabs + 16, scrub=CONFIG.get("scrub", True)
    )
    mapper = Mapper(branch, gpu, physical.client.fd, physical.client.handle)
    routes = tuple(MemoryRoute(value) for value in CONFIG.get("routes", [1, 2]))
    gate = TestGate()
    agent: Agent
    memory = NvidiaMemoryPool(
        physical, mapper, settings.slabs, gpu, lambda: agent.holds_standing > 0, routes=routes
    )
    agent = Agent(
        settings=settings, server=server, gate=gate, memory=memory, registry=registry,
        identity=LocalIdentity(registry.launchers, os.getuid()), events=events, device=Device.NVIDIA,
    )  # fmt: skip
    agent.pool = make_pool(settings, agent)
    agent.moves = SlabMoves(memory, registry, agent)
    memory.fill()

    def answer() -> None:
        for line in sys.stdin:
            held = {h.name: h.count for h in agent.pool.holders.values()}
            if json.loads(line)["ask"] == "refused":
                pid = next(pid for pid, p in registry.processes.items() if p.memory and held[p.tenant.name])
                process = registry.processes[pid]
                assert process.memory is not None
                try:
                    memory.discard(process.memory.arena, [0])
                    said = "taken"
                except Exception as error:  # noqa: BLE001 -- its name is the answer
                    said = type(error).__name__
                print(json.dumps(said), flush=True)
                continue
            print(
                json.dumps({
                    "held": held, "free": agent.pool.free, "ready": memory.ready, "orphans": memory.orphans,
                    "holds": len(gate.held_ns), "standing": agent.holds_standing,
                    "fds": len(os.listdir("/proc/self/fd")),
                }),
                flush=True,
            )  # fmt: skip

    threading.Thread(target=answer, daemon=True).start()
    print("ready", flush=True)
    server.run(agent)


main()
