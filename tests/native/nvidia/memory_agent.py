# SPDX-License-Identifier: Apache-2.0
"""An agent for the tests of GPU memory: the real one but for the gate, which pauses by raw RM calls on the
victims' own control files. Run under a fake machine; argv is a JSON object (memory_rig.py says what is in
it).

Prints "ready", then answers one JSON line per line on stdin: {"ask": "state"}.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import signal
import socket
import struct
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
from valve_agent.devices.base import ArenaError  # noqa: E402
from valve_agent.devices.nvidia import rm  # noqa: E402
from valve_agent.devices.nvidia.cuda_driver import CudaDriver  # noqa: E402
from valve_agent.devices.nvidia.inventory import NvidiaInventory  # noqa: E402
from valve_agent.devices.nvidia.memory import NvidiaMemoryPool  # noqa: E402
from valve_agent.devices.nvidia.physical import PhysicalSlabs  # noqa: E402
from valve_agent.devices.nvidia.uvm import Mapper  # noqa: E402
from valve_agent.events import EventLog  # noqa: E402
from valve_agent.gpu_limits import GpuLimits  # noqa: E402
from valve_agent.identity import LocalIdentity  # noqa: E402
from valve_agent.registry import Registry  # noqa: E402
from valve_agent.server import Server  # noqa: E402
from valve_agent.share import make_pool  # noqa: E402
from valve_agent.shared import Page  # noqa: E402
from valve_agent.slab_moves import SlabMoves  # noqa: E402
from valve_agent.wire import Device, MemoryRoute, Role  # noqa: E402
from valve_api.load import load_policy  # noqa: E402
from valve_api.settings import settings_for  # noqa: E402

LIBC = ctypes.CDLL(None, use_errno=True)
BRANCH = rm.BRANCHES[(rm.driver_version() or "")[:3]]


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
            try:
                if os.stat(f"/proc/{entry['pid']}/fd/{name}").st_ino not in inodes:
                    continue
                fd = pidfd_getfd(entry["pid"], int(name))
            except OSError:  # it was closed meanwhile: not the one that the client lives on
                continue
            client = raw.Client(fd=fd, handle=entry["handle"])
            probe = client.control(entry["handle"], 0x201, bytes(128))[0]
            if probe != raw.INVALID_CLIENT:
                subdevice = raw.subdevice_of(client, BRANCH.name_string)
                result = client.disable(subdevice, channels, on=on)
                assert result == raw.OK, hex(result)
            os.close(fd)


def pidfd_getfd(pid: int, number: int) -> int:
    """Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        fd = int(LIBC.syscall(438, pidfd, number, 0))
    finally:
        os.close(pidfd)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return fd


class TestGate:
    """Open except under a hold. `lies`: answers a hold without pausing anybody."""

    def __init__(self) -> None:
        self.doorbell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._targets: dict[int, int] = {}
        self._pages: dict[int, Page] = {}
        self._tables: dict[int, mmap.mmap] = {}
        self._holds = 0
        self._lock = threading.Lock()
        self.held_ns: list[int] = []
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            for page in list(self._pages.values()):
                with contextlib.suppress(AttributeError):  # it was closed meanwhile
                    page.heartbeat_ns = time.monotonic_ns()
            time.sleep(0.02)

    def add_engine(self, conn: int, pid: int, page_fd: int) -> None:
        self._pages[conn] = Page(page_fd)

    def add_target(self, conn: int, pid: int, pidfd: int, page_fd: int, barrier: bool) -> None:
        self._pages[conn] = Page(page_fd)
        self._targets[conn] = pid
        os.kill(pid, signal.SIGCONT)  # it stops itself when its agent dies

    def remove(self, conn: int) -> None:
        self._targets.pop(conn, None)
        self._pages.pop(conn).close()
        if conn in self._tables:
            self._tables.pop(conn).close()

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
        with self._lock:  # two threads hold, one releases
            self._holds += 1
            if self._holds == 1:
                pause(set(self._targets.values()), True)
        self.held_ns.append(time.monotonic_ns())

    def release(self) -> None:
        with self._lock:
            self._holds -= 1
            if self._holds == 0:
                pause(set(self._targets.values()), False)

    def fileno(self) -> int:
        return self._events

    def read_events(self) -> list[dict[str, Any]]:
        return []


def nvml() -> dict[int, int]:
    """pid -> bytes. Raises DeviceError."""
    with NvidiaInventory() as inventory:
        return {process.pid: process.used_bytes for process in inventory.processes(0)}


def main() -> None:
    settings = settings_for(load_policy(Path(CONFIG["policy"])), CONFIG["bytes"])
    settings = dataclasses.replace(settings, recovery_grace_ns=CONFIG.get("grace_ns", 0))
    server = Server(sockets.listen(Path(CONFIG["socket"]), 0o666))
    registry = Registry()
    events = EventLog(Path(CONFIG["events"]), sys.stderr)
    driver = CudaDriver()
    gpu = driver.uuid(0)
    physical = PhysicalSlabs(
        driver, 0, settings.slab_bytes, settings.slabs + 16, scrub=CONFIG.get("scrub", True)
    )
    mapper = Mapper(BRANCH, gpu, physical.client.fd, physical.client.handle)
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
    looks: list[int] = []

    def seen() -> dict[int, int]:
        looks.append(1)
        return nvml()

    agent.limits = GpuLimits(registry, settings.slab_bytes, seen, agent.kill_process, context_bytes=0)
    if CONFIG.get("fill", True):
        memory.fill()

    def act(what: str) -> str:
        """Do to the only offline process what the agent never does."""
        process = next(p for p in registry.processes.values() if p.memory and p.tenant.role == Role.OFFLINE)
        assert process.memory is not None
        arena = process.memory.arena
        if what == "unmap slab 0":
            block = struct.pack("<QQ16sII", arena.base, memory.slab_bytes, gpu, 0, 0)
            return hex(raw.uvm(arena.memory_fd, 66, block, 32))
        try:
            memory.discard(arena, [0]) if what == "discard without a hold" else memory.grant(arena, [7])
        except ArenaError as error:
            return type(error).__name__
        return "done"

    def answer() -> None:
        for line in sys.stdin:
            held = {h.name: h.count for h in agent.pool.holders.values()}
            if json.loads(line)["ask"] != "state":
                print(json.dumps(act(json.loads(line)["ask"])), flush=True)
                continue
            print(
                json.dumps({
                    "held": held, "free": agent.pool.free, "ready": memory.ready, "orphans": memory.orphans,
                    "holds": len(gate.held_ns), "looks": len(looks), "standing": agent.holds_standing,
                    "fds": len(os.listdir("/proc/self/fd")),
                }),
                flush=True,
            )  # fmt: skip

    threading.Thread(target=answer, daemon=True).start()
    print("ready", flush=True)
    server.run(agent)


main()
