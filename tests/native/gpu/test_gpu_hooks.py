# SPDX-License-Identifier: Apache-2.0
"""Launches are held however a program finds them, other look-ups are left alone, and versions negotiate."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_agent import FakeAgent
from gpu_captured import RAW, Captured
from gpu_node import VICTIM
from victims import build

import fakenv
from valve_agent import gpu_link, wire
from valve_agent.identity import IdentityError
from valve_agent.wire import Role

FIND = """
name = %r
class Way:
    linked = lambda: getattr(ctypes.CDLL(None), name)
    dlsym = lambda: getattr(ctypes.CDLL("libcuda.so.1"), name)
    def finder():
        p, zero = ctypes.c_void_p(), ctypes.c_uint64(0)
        assert cu.lib.cuGetProcAddress_v2(name.encode(), ctypes.byref(p), 12000, zero, None) == 0
        return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 11)(p.value)
    def finder_of_finder():
        f, p, zero = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64(0)
        assert cu.lib.cuGetProcAddress_v2(b"cuGetProcAddress", ctypes.byref(f), 12000, zero, None) == 0
        find = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64,
                                ctypes.c_void_p)(f.value)
        assert find(name.encode(), ctypes.byref(p), 12000, 0, None) == 0
        return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 11)(p.value)
    def finder_of_first_finder():
        find, p, zero = {}, ctypes.c_void_p(), ctypes.c_uint64(0)
        for version in (12000, 11080, 12010):
            f = ctypes.c_void_p()
            assert cu.lib.cuGetProcAddress_v2(b"cuGetProcAddress", ctypes.byref(f), version, zero, None) == 0
            find[version] = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int,
                                             ctypes.c_uint64, ctypes.c_void_p)(f.value)
        left_over = 1  # in the register of a fifth argument, by a caller that knows of four
        assert find[11080](name.encode(), ctypes.byref(p), 11080, 0, left_over) == 0
        return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 11)(p.value)
f = ctypes.c_void_p(); cu("cuModuleGetFunction", ctypes.byref(f), cu.module, b"nop")
params = (ctypes.c_void_p * 1)()
call = Way.%s()
def launch(): return call(f, 1, 1, 1, 1, 1, 1, 0, None, params, None)
"""


@pytest.fixture
def captured(new_machine: fakenv.NewMachine, library: Path, tmp_path: Path) -> Iterator[Captured]:
    made = Captured(new_machine(), library, tmp_path, wire.Device.NVIDIA)
    yield made
    made.close()


@pytest.mark.parametrize("way", ["linked", "dlsym", "finder", "finder_of_finder", "finder_of_first_finder"])
def test_a_launch_waits_however_it_was_found(captured: Captured, way: str) -> None:
    captured.run(VICTIM)
    captured.run(FIND % ("cuLaunchKernel", way))
    assert captured.run("result = launch()") == 0
    assert captured.at().launch_hooks >= 1
    captured.hold()
    captured.actor.start("result = launch()")
    assert captured.waits(), way
    captured.let_go()
    assert captured.finish() == 0
    assert captured.at().launches_held >= 1


def test_copies_wait_on_the_launch_gate_only(captured: Captured) -> None:
    captured.run(VICTIM)
    captured.run("p, h = cu.alloc(4096), cu.host(4096)")
    copy = "cu('cuMemcpyDtoH_v2', h, p, 4096); result = 1"
    captured.hold()
    assert captured.run(copy) == 1, "the channels decide on the other routes"
    captured.at().route = wire.Route.LAUNCH_GATE
    captured.actor.start(copy)
    assert captured.waits()
    captured.let_go()
    assert captured.finish() == 1


def test_a_drain_ends_when_the_last_kernel_does(captured: Captured) -> None:
    captured.run(VICTIM)
    table = captured.at()
    table.route = wire.Route.LAUNCH_GATE
    captured.run("cu.launch('spin_us', 300000)")
    captured.hold()
    table.order(1 << 2 | 2)
    table.wake_command()
    time.sleep(0.05)
    assert table.answered == 0, "it still runs"
    deadline = time.monotonic() + 20
    while table.answered != 1 << 2 | 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not any(c["state"] == "running" for c in captured.machine.status()["channels"])


def test_rtld_next_is_the_callers_next(captured: Captured, library: Path, tmp_path: Path) -> None:
    """dlsym is interposed, and must still see who called."""
    source = Path(__file__).with_name("next.c")
    for name, flags in (("first", ["-DFIRST"]), ("second", ["-DSECOND"])):
        target = str(tmp_path / f"lib{name}.so")
        subprocess.run([build.compiler(), "-shared", "-fPIC", *flags, "-o", target, str(source)], check=True)
    program = tmp_path / "next"
    command = [build.compiler(), "-o", str(program), str(source), f"-L{tmp_path}", "-lfirst", "-lsecond"]
    subprocess.run([*command, f"-Wl,-rpath,{tmp_path}"], check=True)
    captured.run("import subprocess")
    captured.actor.start(
        f"result = subprocess.run([{str(program)!r}], capture_output=True, text=True).stdout"
    )
    link = captured.agent.accept()
    link.welcome(wire.Role.OFFLINE, device=wire.Device.NVIDIA)
    assert captured.finish() == "2 2\n"
    link.close()


def test_an_agent_of_version_1_is_spoken_to_in_version_1(
    new_machine: fakenv.NewMachine, library: Path, tmp_path: Path
) -> None:
    """It cannot know of GPUs; what it is sent is what it understands."""
    agent = FakeAgent(tmp_path / "agent.sock")
    actor = new_machine().actor(
        "env", f"LD_PRELOAD={library}", f"VALVE_SOCKET={agent.path}", "VALVE_WORKLOAD=offline"
    )
    link = agent.accept()
    hello = link.expect(wire.Hello)
    assert (hello.version_min, hello.version_max) == (1, 2)
    link.page.heartbeat_ns = time.monotonic_ns()
    link.start_heart()
    welcome = wire.Welcome(
        role=wire.Role.OFFLINE, device=wire.Device.NVIDIA, tenant=1, slab_bytes=4 << 20, slabs_limit=8,
        lease_ms=link.lease_ms,
    )  # fmt: skip
    welcome.header.version = 1
    link.send(welcome, [link.page_fd])
    actor.run(RAW)
    assert actor.run("result = c.alloc(t['tsg'], rm.CHANNEL, bytes(368))[0]") == 0
    actor.run(f"""
        import ctypes, threading
        lib = ctypes.CDLL({str(library)!r}); lib.valve_want.argtypes = [ctypes.c_uint32, ctypes.c_int]
        lib.valve_want(1, 0)
    """)
    actor.close()
    agent.close()
    os.close(agent.doorbell)


@pytest.mark.parametrize(
    ("what", "role", "device", "version", "refused"),
    [
        ("an old offline runtime on a GPU", Role.OFFLINE, wire.Device.NVIDIA, 1, True),
        ("a new one", Role.OFFLINE, wire.Device.NVIDIA, 2, False),
        ("an old online runtime: it is never paused", Role.ONLINE, wire.Device.NVIDIA, 1, False),
        ("an old one on the cpu device", Role.OFFLINE, wire.Device.CPU, 1, False),
    ],
)
def test_who_is_too_old(what: str, role: Role, device: wire.Device, version: int, refused: bool) -> None:
    with contextlib.ExitStack() as stack:
        if refused:
            stack.enter_context(pytest.raises(IdentityError, match="could not be paused"))
        gpu_link.check_version(role, device, version)
