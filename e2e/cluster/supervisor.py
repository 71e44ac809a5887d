# SPDX-License-Identifier: Apache-2.0
"""Runs a cluster's processes so that none can outlive the test that started them, whatever kills it.

    supervisor.py [--isolate] [--bind SOURCE:TARGET]... [--overlay FOLDER:TARGET]...
                  [--remove DIRECTORY] [--cgroup NAME]

Two processes. The *janitor* waits for the other one and then removes DIRECTORY and the cgroups called NAME,
so it cleans up however that one ended. The *init* starts what it is told to over stdin and ends when stdin
ends, which is also what a SIGKILL of the test looks like. With --isolate, init is PID 1 of its own PID,
mount and network namespaces: the kernel kills everything in them with it, shims that made themselves
daemons included. Without, it is a child subreaper and kills what it can find.

Protocol: a JSON object a line each way, one reply per request; the first line init writes is {"pid": its PID
as the test sees it}.

    {"op": "spawn", "argv": [...], "env": {...}, "log": path}     -> {"pid": n}
    {"op": "poll", "pid": n}                                      -> {"returncode": null | code}
    {"op": "signal", "pid": n, "signal": s, "group": bool}        -> {}

Standard library only and no import of this package: it runs as `python -I -S`. Single-threaded. Caller:
e2e.cluster.processes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID = 0x0002_0000, 0x4000_0000, 0x2000_0000
MS_BIND, MS_REC, MS_SLAVE, MS_SHARED = 0x1000, 0x4000, 0x8_0000, 0x10_0000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CGROUPS = Path("/sys/fs/cgroup")
CLEAN_UP_S = 60.0

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """A libc call that raises OSError."""
    if getattr(libc, name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{arguments}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def isolate(binds: list[str], overlays: list[str]) -> None:
    """Own mounts and network for this process, which is already PID 1 of its own PID namespace."""
    call("unshare", CLONE_NEWNS | CLONE_NEWNET)
    mount("none", "/", "", MS_REC | MS_SLAVE)
    mount("none", "/", "", MS_REC | MS_SHARED)  # shared among themselves: pods may ask for propagation
    mount("proc", "/proc", "proc", 0)
    for bind in binds:
        source, target = bind.split(":")
        mount(source, target, "", MS_BIND | MS_REC)
    for overlay in overlays:
        source, target = overlay.split(":")
        layers = f"lowerdir={target},upperdir={source}/upper,workdir={source}/work"
        mount("overlay", target, "overlay", 0, layers)


class Init:
    """The process that owns all others: starts, signals and reaps them."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.returncodes: dict[int, int] = {}

    def serve(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = getattr(self, "do_" + request.pop("op"))(**request)
            except OSError as error:
                reply = {"error": str(error)}
            print(json.dumps(reply), flush=True)

    def do_spawn(self, argv: list[str], env: dict[str, str], log: str) -> dict[str, Any]:
        pid = os.fork()
        if pid:
            self.running.add(pid)
            self.returncodes.pop(pid, None)  # of an earlier process with this PID
            return {"pid": pid}
        try:
            os.setsid()
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.closerange(3, 64)
            os.execvpe(argv[0], argv, env)
        except OSError as error:
            os.write(2, f"{error}\n".encode())
        finally:
            os._exit(127)

    def do_poll(self, pid: int) -> dict[str, Any]:
        self.reap()
        return {"returncode": self.returncodes.get(pid)}

    def do_signal(self, pid: int, signal: int, group: bool) -> dict[str, Any]:
        self.reap()
        if pid in self.running:
            (os.killpg if group else os.kill)(pid, signal)
        return {}

    def reap(self) -> None:
        """Collect every child that has ended, adopted ones included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.running.discard(pid)
            self.returncodes[pid] = os.waitstatus_to_exitcode(status)

    def kill_all(self) -> None:
        """End everything below this process; what is orphaned meanwhile becomes our child and follows."""
        deadline = time.monotonic() + CLEAN_UP_S
        while time.monotonic() < deadline:
            for pid in [-1] if os.getpid() == 1 else children():
                kill(pid)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def children() -> list[int]:
    return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]


def run_init(arguments: argparse.Namespace, pid: int) -> None:
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # if the janitor is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the test, which then closes stdin
    if arguments.isolate:
        isolate(arguments.bind, arguments.overlay)
    else:
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    print(json.dumps({"pid": pid}), flush=True)
    init = Init()
    try:
        init.serve()
    finally:
        init.kill_all()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(pid, signal.SIGKILL)


def remove_cgroups(name: str) -> None:
    """Remove the tree `name` from every hierarchy (v1 has one per controller), waiting for it to be empty."""
    deadline = time.monotonic() + CLEAN_UP_S
    while True:
        tops = [CGROUPS / name, *(top / name for top in CGROUPS.iterdir() if top.is_dir())]
        left = [top for top in tops if top.is_dir()]
        if not left:
            return
        for top in left:
            for folder, _, _ in os.walk(top, topdown=False):
                try:
                    os.rmdir(folder)
                except OSError as error:  # a process in it is still ending
                    if time.monotonic() > deadline:
                        raise OSError(error.errno, f"cannot remove the cgroup {folder}: {error}") from error
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--isolate", action="store_true")
    parser.add_argument("--bind", action="append", default=[])
    parser.add_argument("--overlay", action="append", default=[])
    parser.add_argument("--remove")
    parser.add_argument("--cgroup")
    arguments = parser.parse_args()
    if arguments.isolate:
        call("unshare", CLONE_NEWPID)  # takes effect for the next child
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        run_init(arguments, int(os.read(read, 32)))
        return 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: kill(child))
    os.write(write, str(child).encode())
    sys.stdin.close()
    sys.stdout.close()
    _, status = os.waitpid(child, 0)
    if arguments.cgroup:
        remove_cgroups(arguments.cgroup)
    if arguments.remove:
        shutil.rmtree(arguments.remove)
    return abs(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    sys.exit(main())
