# SPDX-License-Identifier: Apache-2.0
"""Who computes on the GPU against whom Valve controls: what is let be, reported, ended."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

from valve_agent.gpu_watch import LOOKS, GpuWatch
from valve_agent.registry import Process, Tenant
from valve_agent.wire import Role


class Cast:
    """Pids by what they are."""

    def __init__(self, **pids: int) -> None:
        self.pids = pids
        self.captured: set[int] = set()

    def process(self, pid: int) -> Process | None:
        for name, role in (("online", Role.ONLINE), ("offline", Role.OFFLINE)):
            if self.pids.get(name) == pid:
                tenant = Tenant(1, name, role, 1, 1, -1, None)
                return Process(pid, -1, tenant, name, gpu_files={0} if pid in self.captured else set())
        return None

    def offline_strays(self) -> Iterable[int]:
        return [self.pids[name] for name in ("stray",) if name in self.pids]

    def role_of(self, pid: int) -> tuple[Role, bool]:
        roles = {
            "online_child": (Role.ONLINE, True), "online_elsewhere": (Role.ONLINE, False),
            "offline_elsewhere": (Role.OFFLINE, False),
        }  # fmt: skip
        return next((role for name, role in roles.items() if self.pids.get(name) == pid), (Role.NONE, False))

    def ours(self) -> Iterable[int]:
        return [self.pids.get("gate", -1)]


@pytest.mark.parametrize(
    ("what", "who", "refuse", "captured", "outcome"),
    [
        ("an online process", "online", True, False, None),
        ("a worker of an online engine, without libvalve", "online_child", True, False, None),
        ("an offline process that is captured", "offline", True, True, None),
        ("an offline process that is not", "offline", False, False, ("uncontrolled", True)),
        ("a child of an offline tenant without libvalve", "stray", False, False, ("uncontrolled", True)),
        ("a stranger", "stranger", False, False, ("unknown-process", False)),
        ("a stranger where the policy refuses", "stranger", True, False, ("unknown-process", False)),
        ("online of another GPU", "online_elsewhere", True, False, ("unknown-process", False)),
        (
            "offline of another GPU, whom this one's gate does not pause",
            "offline_elsewhere",
            False,
            False,
            ("wrong-gpu", True),
        ),
        ("our own gate", "gate", True, False, None),
    ],
)
def test_the_verdict(
    what: str, who: str, refuse: bool, captured: bool, outcome: tuple[str, bool] | None
) -> None:
    cast = Cast(**{who: 500})
    cast.captured = {500} if captured else set()
    watch = GpuWatch(lambda: {500: 32 << 20, os.getpid(): 1}, lambda: refuse)
    looks = [watch.look(cast) for _ in range(LOOKS + 2)]
    assert not any(looks[: LOOKS - 1]), "a context may appear before its channels do"
    found = looks[LOOKS - 1]
    assert [(f.event, f.kill) for f in found] == ([outcome] if outcome else []), what
    assert watch.refuses == (who in ("stranger", "online_elsewhere") and refuse)
    if outcome:
        assert "32 MiB" in found[0].why
        assert bool(looks[LOOKS]) == outcome[1], "what must end is found again, a report is made once"


def test_who_comes_and_goes_is_not_counted_on() -> None:
    present: dict[int, int] = {500: 1}
    watch = GpuWatch(lambda: present, lambda: True)
    cast = Cast(stranger=500)
    for _ in range(10):
        present = {500: 1}
        assert watch.look(cast) == []
        present = {}
        assert watch.look(cast) == []


def test_a_change_of_the_policy_holds_at_the_next_look() -> None:
    refuse = False
    watch = GpuWatch(lambda: {500: 1}, lambda: refuse)
    watch.look(Cast(stranger=500))
    assert (watch.refuses, watch.unknown) == (False, 1)
    refuse = True
    watch.look(Cast(stranger=500))
    assert watch.refuses
