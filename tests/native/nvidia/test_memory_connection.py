# SPDX-License-Identifier: Apache-2.0
"""The connection about GPU memory: agents that say too much, nothing at all, or do not come."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_agent import FakeAgent
from memory_rig import ROOT, SLAB, Rig

import fakenv
from valve_agent import wire

BEGIN = f"""
import os, sys, time; sys.path.insert(0, {str(ROOT / "runtime")!r})
from valve_runtime import _lib
import driver_api; cu = driver_api.Cuda()
valve = _lib.load()
def opened(timeout_ms=20000):
    try:
        valve.arena_open({SLAB}, timeout_ms)
    except _lib.ArenaDenied as error:
        return str(error)
def numbers():
    return sorted(os.listdir("/proc/self/fd"), key=int)
"""


class Asking:
    """An online process on the fake driver that asks the test for GPU memory."""

    def __init__(self, machine: fakenv.Machine, library: Path, agent: FakeAgent) -> None:
        self.agent = agent
        self.actor = machine.actor(
            "env", f"LD_PRELOAD={library}", f"VALVE_SOCKET={agent.path}", "VALVE_WORKLOAD=online"
        )
        self.actor.start(BEGIN)
        agent.accept().welcome(wire.Role.ONLINE, agent.doorbell, device=wire.Device.NVIDIA)
        self.actor.finish()

    def answer(self, frame: bytes, descriptors: int) -> str:
        """What it says after this answer to its question."""
        self.actor.start("result = opened()")
        link = self.agent.accept()
        link.expect(wire.MemoryOpen)
        with open("/dev/null") as file:
            socket.send_fds(link.sock, [frame], [file.fileno()] * descriptors)
        return str(self.actor.finish())


@pytest.fixture
def asking(new_machine: fakenv.NewMachine, library: Path, agent: FakeAgent) -> Iterator[Asking]:
    made = Asking(new_machine(), library, agent)
    yield made
    made.actor.close()


def denied() -> bytes:
    return bytes(wire.Denied(code=wire.RejectCode.EARENA, text=b"not today"))


ANSWERS = [
    pytest.param(denied, "not today", id="a refusal"),
    pytest.param(lambda: bytes(64), "does not answer about GPU memory", id="no frame"),
    pytest.param(
        lambda: bytes(wire.Memory(slabs=1, slab_bytes=SLAB)), "cuMemImportFromShareableHandle", id="memory"
    ),
    pytest.param(lambda: bytes(wire.MemoryReady(route=1)), "", id="a frame out of turn"),
]


@pytest.mark.parametrize(("frame", "sentence"), ANSWERS)
@pytest.mark.parametrize("descriptors", [3, 4, 40])
def test_descriptors_that_nobody_asked_for_are_closed(
    asking: Asking, frame: Callable[[], bytes], sentence: str, descriptors: int
) -> None:
    before = asking.actor.run("result = numbers()")
    assert sentence in asking.answer(frame(), descriptors)
    assert asking.actor.run("result = numbers()") == before
    assert "not today" in asking.answer(denied(), 0), "it may ask again"


def test_an_agent_that_accepts_nobody_is_not_waited_for(asking: Asking, agent: FakeAgent) -> None:
    with ExitStack() as stack:
        for sock in agent.fill_backlog():
            stack.enter_context(sock)
        asking.actor.start(
            "begin = time.monotonic(); said = opened(500); result = [said, time.monotonic() - begin]"
        )
        said, took_s = asking.actor.finish()  # type: ignore[misc]
    assert "no agent answers" in said
    assert took_s < 10


def test_signals_of_the_process_do_not_reach_the_memory_thread(new_rig: Callable[..., Rig]) -> None:
    tenant = new_rig(routes=[wire.MemoryRoute.BY_TENANT]).tenant("offline", "batch", slabs=2)
    tasks = list(Path(f"/proc/{tenant.pid}/task").iterdir())
    (thread,) = [task for task in tasks if (task / "comm").read_text() == "valve-memory\n"]
    (mask,) = [line for line in (thread / "status").read_text().splitlines() if line.startswith("SigBlk")]
    assert int(mask.split()[1], 16) & 0x7FFFFFFF == 0x7FFFFFFF & ~(1 << 8 | 1 << 18), "all but KILL and STOP"
