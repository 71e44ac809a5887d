# SPDX-License-Identifier: Apache-2.0
"""One agent, several GPUs: each has its own gate, pool and tenants; an engine on two is busy for both."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from gpu_node import VICTIM, NewNode, Node, advances, busy, comes_to_stand, idle, stands

from valve_cli.bench.rig import valve_run, wait_for

TWO = {"gpus": 2}
SLAB = 2 << 20
ARENA = """
import time
from valve_runtime import _lib
valve = _lib.load()
arena = valve.arena_open(4 * {slab}, 20000)
valve.want(2, False)
held = set()
def poll():
    while (event := valve.poll()) is not None:
        held.add(event[1]) if event[0] == _lib.GRANTED else held.discard(event[1])
    return sorted(held)
end = time.monotonic() + 20
while len(poll()) < 2 and time.monotonic() < end:
    time.sleep(0.002)
for slab in held:
    cu("cuMemsetD32_v2", arena.base + slab * {slab}, ctypes.c_uint({value}), {slab} // 4)
result = [cu.read64(arena.base + slab * {slab}) & 0xffffffff for slab in sorted(held)]
"""


def gpus(node: Node) -> list[dict[str, object]]:
    found = node.agent.status()["gpus"]
    assert isinstance(found, list)
    return found


def test_a_busy_engine_stops_offline_on_its_own_gpu_only(new_node: NewNode) -> None:
    node = new_node(TWO)
    victims = [node.victim(f"victim-{gpu}", sees=str(gpu)) for gpu in (0, 1)]
    engines = [node.engine(f"engine-{gpu}", sees=str(gpu)) for gpu in (0, 1)]
    for gpu in (0, 1):
        busy(engines[gpu])
        assert comes_to_stand(victims[gpu])
        assert advances(victims[1 - gpu]), "the neighbour's GPU is not disturbed"
        idle(engines[gpu])
        assert advances(victims[gpu])
    assert [sorted(gpu["tenants"]) for gpu in gpus(node)] == [
        ["engine-0", "victim-0"],
        ["engine-1", "victim-1"],
    ]  # type: ignore[call-overload]


def test_an_engine_on_two_gpus_stops_offline_on_both(new_node: NewNode) -> None:
    node = new_node(TWO)
    victims = [node.victim(f"victim-{gpu}", sees=str(gpu)) for gpu in (0, 1)]
    both = node.engine("both", sees="0,1")
    for _ in range(20):  # a ring that one gate took from the other would leave one running
        busy(both)
        assert all(comes_to_stand(one) for one in victims)
        assert all(stands(one) for one in victims)
        idle(both)
        assert all(advances(one) for one in victims)
    counts = [gpu["gate"]["samples"] for gpu in gpus(node)]  # type: ignore[index]
    assert counts == [20, 20], "one preemption for each busy period on each GPU"
    denied = both.run(
        "from valve_runtime import _lib\n"
        "try:\n"
        "    _lib.load().arena_open(1 << 21, 20000); result = ''\n"
        "except Exception as error:\n"
        "    result = str(error)"
    )
    assert "2 GPUs" in denied
    busy(both)
    assert all(comes_to_stand(one) for one in victims)
    os.kill(both.run("import os; result = os.getpid()"), signal.SIGKILL)
    assert all(advances(one) for one in victims), "its end is the end of its request, on both"


def test_memory_of_each_gpu_is_lent_to_its_own_tenants(new_node: NewNode) -> None:
    node = new_node(TWO)
    found = []
    for gpu in (0, 1):
        actor = node.tenant("offline", f"batch-{gpu}", sees=str(gpu))
        actor.run(VICTIM)
        found.append(actor.run(ARENA.format(slab=SLAB, value=0xA0 + gpu)))
    assert found == [[0xA0] * 2, [0xA1] * 2]
    held = [{name: one["held_slabs"] for name, one in gpu["tenants"].items()} for gpu in gpus(node)]  # type: ignore[attr-defined]
    assert held == [{"batch-0": 2}, {"batch-1": 2}]
    assert node.machine.status()["xids"] == [[0, 0], [0, 0]]


def test_offline_on_a_gpu_that_it_was_not_given_is_ended(new_node: NewNode) -> None:
    node = new_node(TWO)
    stray = node.tenant("offline", "stray", sees="0")
    stray.run("import os; del os.environ['CUDA_VISIBLE_DEVICES']; import driver_api; cu = driver_api.Cuda(1)")
    said = wait_for("the verdict", lambda: node.agent.events("wrong-gpu"), 20)
    assert "was not given" in said[0]["why"]
    assert said[0]["gpu"] == gpus(node)[1]["id"], "events say which GPU they are about"
    assert stray.process.wait(timeout=20) != 0


def test_a_gpu_that_fell_off_the_bus_does_not_keep_the_others_from_being_shared(new_node: NewNode) -> None:
    node = new_node(TWO, knobs={"lost 1": "1"})
    (left,) = gpus(node)
    assert "0" in str(left["id"])
    assert node.agent.status()["unusable"].keys() == {"GPU 1"}
    one = node.victim("victim-0", sees="0")
    chat = node.engine("chat", sees="0")
    busy(chat)
    assert comes_to_stand(one)


@pytest.mark.parametrize(
    ("description", "visible", "words"),
    [
        ("a GPU that is not there", "7", "7 is none of the GPUs that this agent shares: 0 (GPU-"),
        ("offline on two", "0,1", "an offline tenant has one GPU"),
    ],
)
def test_a_launcher_that_is_refused_hears_why(
    description: str, visible: str, words: str, new_node: NewNode, tmp_path: Path
) -> None:
    node = new_node(TWO)
    done = subprocess.run(
        [*node.machine.prefix(), *valve_run(node.agent.socket, node.bundle, "offline", "", ["true"])],
        capture_output=True, text=True, timeout=60,
        env={**node.machine.environment(), "CUDA_VISIBLE_DEVICES": visible},
    )  # fmt: skip
    assert done.returncode == 125, description
    assert words in done.stderr


def test_only_some_gpus_can_be_shared(new_node: NewNode) -> None:
    node = new_node(TWO, arguments=("--gpus", "1"))
    (left,) = gpus(node)
    status = node.agent.status()
    assert (status["unusable"], status["id"]) == ({}, left["id"])
    chat, one = node.engine("chat", sees="1"), node.victim("victim-1", sees="1")
    busy(chat)
    assert comes_to_stand(one)
