# SPDX-License-Identifier: Apache-2.0
"""Which GPU's agent a connection belongs to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from valve_agent import wire
from valve_agent.connection import Kind
from valve_agent.devices.base import DeviceInfo
from valve_agent.identity import IdentityError
from valve_agent.router import Router
from valve_agent.wire import Role

DEVICES = [
    DeviceInfo(number, f"GPU-{letter}{letter}", "nvidia", "fake", 1) for number, letter in enumerate("abc")
]
PID = 4321


class StubAgent:
    """What the router uses of an Agent; keeps what it was given."""

    def __init__(self, serves: set[int] | None = None) -> None:
        self.registry = SimpleNamespace(processes={}, launchers={})
        self.identity = SimpleNamespace(
            serves=lambda pid: pid in (serves or set()),
            tenant_of=lambda pid: SimpleNamespace(role=Role.ONLINE),
        )
        self.seen: list[str] = []
        self.turns = 0

    def on_frame(self, connection: Any, frame: wire.Frame, fds: list[int]) -> None:
        self.seen.append(frame.TYPE.name)

    def on_closed(self, connection: Any, why: str) -> None:
        self.seen.append("closed")

    def on_turn(self) -> None:
        self.turns += 1

    def deadline_ns(self) -> int | None:
        return None


def connection(number: int = 1, pid: int = PID) -> Any:
    return SimpleNamespace(id=number, kind=Kind.NEW, peer=SimpleNamespace(pid=pid))


def router(tmp_path: Path, agents: list[Any], visible: str | None = None) -> Router:
    (tmp_path / str(PID)).mkdir()
    words = [b"PATH=/bin"] + ([f"CUDA_VISIBLE_DEVICES={visible}".encode()] if visible is not None else [])
    (tmp_path / str(PID) / "environ").write_bytes(b"\0".join(words) + b"\0")
    return Router(agents, DEVICES[: len(agents)], lambda: None, proc=tmp_path)


@pytest.mark.parametrize(
    ("description", "visible", "role", "home"),
    [
        ("says nothing: the first GPU", None, Role.OFFLINE, 0),
        ("sees everything by an empty name: the first GPU", "", Role.OFFLINE, 0),
        ("by number", "2", Role.OFFLINE, 2),
        ("by the beginning of a UUID, as CUDA takes it", "GPU-b", Role.OFFLINE, 1),
        ("online may have several, the first is its home", "1,0", Role.ONLINE, 1),
    ],
)
def test_a_launcher(description: str, visible: str | None, role: Role, home: int, tmp_path: Path) -> None:
    agents: list[Any] = [StubAgent(), StubAgent(), StubAgent()]
    router(tmp_path, agents, visible).on_frame(connection(), wire.Tenant(role=role), [])
    assert [agent.seen for agent in agents] == [["TENANT"] if n == home else [] for n in range(3)]


@pytest.mark.parametrize(
    ("description", "visible", "role", "words"),
    [
        ("a number that is not there", "3", Role.ONLINE, "3 is none of the GPUs"),
        ("a UUID that is not there", "GPU-x", Role.ONLINE, "0 (GPU-aa), 1 (GPU-bb), 2 (GPU-cc)"),
        ("a UUID that is not unique", "GPU-", Role.ONLINE, "GPU- is none of the GPUs"),
        (
            "offline on several",
            "0,1",
            Role.OFFLINE,
            "an offline tenant has one GPU: set CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_a_launcher_that_is_refused(
    description: str, visible: str, role: Role, words: str, tmp_path: Path
) -> None:
    agents: list[Any] = [StubAgent(), StubAgent(), StubAgent()]
    with pytest.raises(IdentityError) as refused:
        router(tmp_path, agents, visible).on_frame(connection(), wire.Tenant(role=role), [])
    assert words in str(refused.value)
    assert not any(agent.seen for agent in agents)


def test_a_process_belongs_to_the_gpu_of_its_tenant_until_its_connection_ends(tmp_path: Path) -> None:
    agents: list[Any] = [StubAgent(), StubAgent({PID}), StubAgent()]
    made = router(tmp_path, agents)
    made.on_frame(connection(7), wire.Hello(), [])
    made.on_frame(connection(7), wire.Want(), [])
    made.on_closed(connection(7), "")
    made.on_frame(connection(8, pid=1), wire.Hello(), [])
    assert [agent.seen for agent in agents] == [["HELLO"], ["HELLO", "WANT", "closed"], []]
    agents[2].registry.processes[PID] = object()
    made.on_frame(connection(9), wire.MemoryOpen(), [])
    assert agents[2].seen == ["MEMORY_OPEN"], "a memory connection follows its process"


def test_an_online_pod_with_two_gpus_is_known_to_both(tmp_path: Path) -> None:
    agents: list[Any] = [StubAgent(), StubAgent({PID}), StubAgent({PID})]
    made = router(tmp_path, agents)
    assert list(made.also_on(agents[1], PID)) == [agents[2]]
    assert [made.role_of(agent, PID) for agent in agents] == [
        (Role.ONLINE, False), (Role.ONLINE, True), (Role.ONLINE, True),
    ]  # fmt: skip
    assert made.role_of(agents[0], 1) == (Role.NONE, False)


def test_every_agent_gets_its_turn_and_the_node_its_second(tmp_path: Path) -> None:
    agents: list[Any] = [StubAgent(), StubAgent()]
    seconds: list[int] = []
    now = [10**9]
    made = Router(agents, DEVICES[:2], lambda: seconds.append(now[0]), proc=tmp_path, clock=lambda: now[0])
    for at in (10**9, 10**9 + 5, 2 * 10**9):
        now[0] = at
        made.on_turn()
    assert (seconds, agents[0].turns, agents[1].turns) == ([10**9, 2 * 10**9], 3, 3)
    assert made.deadline_ns() == 3 * 10**9


def test_a_process_that_ends_while_it_is_looked_at_is_nobodys(tmp_path: Path) -> None:
    agents: list[Any] = [StubAgent({PID}), StubAgent()]

    def gone(pid: int) -> Any:
        raise IdentityError(wire.RejectCode.EIDENTITY, f"process {pid} is gone")

    agents[0].identity.tenant_of = gone
    assert router(tmp_path, agents).role_of(agents[0], PID) == (Role.NONE, False)
