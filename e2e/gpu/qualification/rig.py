# SPDX-License-Identifier: Apache-2.0
"""Processes of one part, and the side of the agent that they need: a server for libvalve, channel control.

Why it exists: a part wants an offline process with the real libvalve, whose channels it stops itself. So the
rig is the agent's server reduced to one role; what stops channels is the product's own NvidiaCompute, or the
real gate process.

Threading model: a part runs in the main thread. One thread serves the connections and writes heartbeats; it
shares `compute` under `lock`. Everything started here is ended by `close`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from qualification.machine import Machine, Tools
from qualification.processes import Actor, ActorError, Online, RigError, Watch
from valve_agent import wire
from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia.compute import GpuTarget, NvidiaCompute
from valve_agent.devices.nvidia.plan import Commit
from valve_agent.devices.nvidia.routes import ChannelRoute, InProcessRoute, Route
from valve_agent.devices.nvidia.table import Channel
from valve_agent.gate_link import GateError, GateHandle
from valve_agent.shared import Page

LEASE_MS = 3_600_000
SLAB_BYTES = 2 << 20
BROKEN = (RigError, ActorError, GateError, DeviceError, OSError)
"""What one case of a part may end with, so that the others still count."""
EAGER = {"CUDA_MODULE_LOADING": "EAGER"}
"""A kernel that libcuda loads at its first launch would wait for a paused GPU, and be in the figures."""


class Rig:
    """One part's processes. With `gate` they are controlled by the real gate process, else by `compute`."""

    def __init__(
        self,
        machine: Machine,
        tools: Tools,
        *,
        commit: Commit = Commit.NONE,
        in_process: bool = False,
        gate: GateHandle | None = None,
    ) -> None:
        self.machine, self.tools, self.gate = machine, tools, gate
        route: Route = InProcessRoute() if in_process else ChannelRoute(commit)
        self.compute = NvidiaCompute([route])
        self.lock = threading.Lock()
        self.problems: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="valve-gpu-")
        self.folder = Path(self._folder.name)
        self._undo = contextlib.ExitStack()
        self._undo.callback(self._folder.cleanup)
        self._socket_path = self.folder / "agent.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self._socket_path))
        self._listener.listen(64)
        self._links: dict[int, _Link] = {}
        self._targets: dict[int, GpuTarget] = {}
        self._pages: dict[str, tuple[int, Page]] = {}
        self._refused: set[int] = set()
        self._stop_r, self._stop_w = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="serve")
        self._thread.start()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        # A fake GPU must be at rest when its memory goes. What a death while paused leaves behind on a GPU
        # is e12's question; the others end their processes as everybody does.
        before_end = self.compute.quiesce if self.machine.is_fake else self.compute.resume
        with contextlib.suppress(DeviceError), self.lock:
            before_end(list(self._targets.values()))
        try:
            self._undo.close()
        finally:
            os.write(self._stop_w, b"x")
            self._thread.join()
            for link in list(self._links.values()):
                self._drop(link)
            for fd in (self._stop_r, self._stop_w):
                os.close(fd)
            self._listener.close()

    # -- processes -------------------------------------------------------------------------

    def offline(self, cuda: bool = True) -> Actor:
        """A process under libvalve, known to the control. Its kernels may run."""
        actor = self._add(Actor({**self.environment("offline"), **EAGER}, self.tools.kernels))
        self._wait(lambda: actor.pid in self._targets or self.gate is not None, "its libvalve to connect")
        if cuda:
            actor.cuda()
        if cuda and not self.gate and not any(channel.computes for channel in self.channels(actor)):
            raise RigError(
                f"libvalve captured no compute channel of process {actor.pid} ({len(self.channels(actor))} "
                "of any kind), so nothing of it can be paused; e15 says what libcuda called"
            )
        return actor

    def bare(self, cuda: bool = True, prefix: tuple[str, ...] = ()) -> Actor:
        """A process that Valve knows nothing of: a neighbour, a stranger."""
        actor = self._add(Actor({**os.environ, **EAGER}, self.tools.kernels, prefix))
        return actor.cuda() if cuda else actor

    def traced(self) -> dict[str, int]:
        """What libcuda asks of the driver until a kernel has run, and how often: see tracer.c."""
        trace = self.folder / "trace"
        preload = {"LD_PRELOAD": str(self.tools.tracer), "VALVE_TRACE": str(trace)}
        actor = self._add(Actor({**os.environ, **EAGER, **preload}, self.tools.kernels)).cuda()
        actor.run("cu.launch('nop'); cu.synchronize()")
        return dict(sorted(Counter(trace.read_text().splitlines()).items())) if trace.exists() else {}

    def online(self, watch: Watch, hold_us: int = 1000, gap_us: int = 1000) -> Online:
        """An engine for `gate`; the victim's sign of life is `watch`."""
        page_fd, page = Page.create()
        self._pages["online"] = (page_fd, page)
        words = [hold_us, gap_us, watch.path, 1, self.tools.libvalve, page_fd]
        process = subprocess.Popen(
            [str(self.tools.online), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[page_fd],
            env={**self.environment("online"), "LD_PRELOAD": ""},
        )
        try:
            online = Online(process)
        except BaseException:
            process.kill()
            process.wait()
            raise
        self._undo.callback(online.close)
        return online

    def hang_up(self, actor: Actor) -> None:
        """As if the agent had died: its connection and its files are gone. It is not let in again."""
        link = next(link for link in self._links.values() if link.pid == actor.pid)
        self._refused.add(actor.pid)
        link.socket.shutdown(socket.SHUT_RDWR)  # the serving thread sees it and drops the link

    def watch(self, observed: bool = True) -> Watch:
        watch = Watch(self.folder, self.tools.observer if observed else None)
        self._undo.callback(watch.close)
        return watch

    def run_timer(
        self, actor: Actor, watch: Watch, us: int = 600_000_000, grid: int = 1, block: int = 1
    ) -> None:
        """A kernel in `actor` that writes `watch` for so long, and is under way on return."""
        actor.run(
            f"page = cu.shared({watch.path!r})\n"
            f"cu.launch('timer_writer', page, {us}, grid={grid}, block={block})"
        )
        if not watch.advances():
            raise RigError("the kernel does not begin")

    def _add(self, actor: Actor) -> Actor:
        self._undo.callback(actor.close)
        return actor

    def environment(self, workload: str) -> dict[str, str]:
        return {
            **os.environ,
            "LD_PRELOAD": str(self.tools.libvalve),
            "VALVE_SOCKET": str(self._socket_path),
            "VALVE_WORKLOAD": workload,
        }

    # -- control ---------------------------------------------------------------------------

    def target(self, actor: Actor) -> GpuTarget:
        return self._targets[actor.pid]

    def pause(self, *actors: Actor) -> tuple[int, int]:
        """The product's pause of compute; CLOCK_MONOTONIC ns before and after. Raises PauseTimeout."""
        return self._timed(self.compute.pause, actors)

    def quiesce(self, *actors: Actor) -> tuple[int, int]:
        """Copy engines too."""
        return self._timed(self.compute.quiesce, actors)

    def resume(self, *actors: Actor) -> tuple[int, int]:
        return self._timed(self.compute.resume, actors)

    def channels(self, actor: Actor) -> list[Channel]:
        """What libvalve knows of it."""
        gpu = self._targets[actor.pid].gpu
        return list(gpu.table.read()[1]) if gpu else []

    def control_file(self, actor: Actor, channel: Channel) -> int:
        """The descriptor that it passed for this channel's client."""
        gpu = self._targets[actor.pid].gpu
        assert gpu is not None
        return gpu.files[channel.file]

    def _timed(self, call: Callable[[list[GpuTarget]], None], actors: tuple[Actor, ...]) -> tuple[int, int]:
        targets = [self._targets[actor.pid] for actor in actors]
        with self.lock:
            began = time.monotonic_ns()
            call(targets)
            return began, time.monotonic_ns()

    # -- server ----------------------------------------------------------------------------

    def _serve(self) -> None:
        poll = select.poll()
        for fd in (self._stop_r, self._listener.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll(500):
                if fd == self._stop_r:
                    return
                if fd == self._listener.fileno():
                    connection, _ = self._listener.accept()
                    self._links[connection.fileno()] = _Link(connection)
                    poll.register(connection, select.POLLIN)
                    continue
                link = self._links[fd]
                try:
                    self._on_frame(link)
                except (wire.WireError, OSError, GateError, DeviceError) as error:
                    if not isinstance(error, wire.ConnectionClosed):
                        self.problems.append(f"process {link.pid}: {error}")
                    poll.unregister(fd)
                    self._drop(link)
            now = time.monotonic_ns()
            for link in self._links.values():
                if link.page and not self.gate:
                    link.page.heartbeat_ns = now
            with self.lock:
                self.compute.tend(list(self._targets.values()))

    def _on_frame(self, link: _Link) -> None:
        frame, fds = wire.recv(link.socket)
        if isinstance(frame, wire.Hello):
            self._welcome(link, frame)
            return
        number = -1 if isinstance(frame, wire.GpuTable) else int(getattr(frame, "number", -1))
        of_control = getattr(frame, "kind", wire.GpuFileKind.CTL) == wire.GpuFileKind.CTL
        if isinstance(frame, wire.GpuTable | wire.GpuFile) and of_control:
            self._supply(link, number, fds)
            return
        if isinstance(frame, wire.GpuFileGone) and of_control:
            self._withdraw(link, number)
        for fd in fds:
            os.close(fd)

    def _welcome(self, link: _Link, hello: wire.Hello) -> None:
        link.pid = int(hello.main_pid)
        if link.pid in self._refused:
            raise wire.ConnectionClosed
        role = wire.Role(hello.role_claimed)
        made = self._pages.pop("online", None) if role == wire.Role.ONLINE else None
        page_fd, link.page = made or Page.create()
        link.page.heartbeat_ns = time.monotonic_ns()
        pidfd = os.pidfd_open(link.pid)
        if self.gate and role == wire.Role.ONLINE:
            self.gate.add_engine(link.pid, link.pid, page_fd)
            os.close(pidfd)
        elif self.gate:
            self.gate.add_target(link.pid, link.pid, pidfd, page_fd, barrier=False)
            os.close(pidfd)
        else:
            with self.lock:
                self._targets[link.pid] = self.compute.open(link.pid, pidfd, False)
        doorbell_fd = os.dup(self.gate.doorbell_fd) if self.gate else os.eventfd(0)
        answer = wire.Welcome(
            role=role, device=wire.Device.NVIDIA, tenant=1, slab_bytes=SLAB_BYTES, lease_ms=LEASE_MS
        )
        wire.send(link.socket, answer, [page_fd, doorbell_fd])
        os.close(page_fd)
        os.close(doorbell_fd)

    def _supply(self, link: _Link, number: int, fds: list[int]) -> None:
        if self.gate:
            self.gate.supply(link.pid, number, fds)
            for fd in fds:
                os.close(fd)
            return
        with self.lock:
            target = self._targets[link.pid]
            self.compute.supply(target, number, fds)
            self.compute.resume([target])

    def _withdraw(self, link: _Link, number: int) -> None:
        if self.gate:
            self.gate.withdraw(link.pid, number)
            return
        with self.lock:
            self.compute.withdraw(self._targets[link.pid], number)

    def _drop(self, link: _Link) -> None:
        self._links.pop(link.socket.fileno(), None)
        link.socket.close()
        if link.page:
            link.page.close()
        if self.gate:
            with contextlib.suppress(Exception):
                self.gate.remove(link.pid)
            return
        with self.lock:
            target = self._targets.pop(link.pid, None)
            if target:
                self.compute.close(target)

    def _wait(self, done: Callable[[], bool], what: str, within_s: float = 20.0) -> None:
        until = time.monotonic() + within_s
        while not done():
            if time.monotonic() > until:
                raise RigError(f"waited {within_s:.0f} s for {what}; {'; '.join(self.problems)}")
            time.sleep(0.005)


class _Link:
    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.pid = 0
        self.page: Page | None = None


def stop_process(actor: Actor) -> None:
    """SIGSTOP, and until it is in that state."""
    actor.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, actor.pid, os.WSTOPPED | os.WNOWAIT)
