# SPDX-License-Identifier: Apache-2.0
"""The allocator under any sequence of admissions, ends, bursts and restarts, in any order of ids.

A model kubelet hands out ids as the real one does: what the plugin prefers, or at random; an init container's
ids may be used again by its pod; a pod's end is heard of late or never. Checked after every step: no id in
two entries, one GPU per request, memory counted once, what is promised is there, an answer once given stays.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from valve_api.container import ContainerName
from valve_deviceplugin.allocator import document, units
from valve_deviceplugin.allocator.ledger import Entry, Ledger
from valve_deviceplugin.allocator.placement import Gpu, room
from valve_deviceplugin.allocator.reconcile import Absences, reconcile

MEMORY, SEATS = "memory", "seats"
GONE_S, SETTLED_S = 3.0, 30.0


@dataclass
class Container:
    owner: ContainerName
    ids: frozenset[str]
    gpu: str
    """as its Allocate said: its process uses this one, whatever happens later"""
    listed: bool = True


class Node(RuleBasedStateMachine):
    """The kubelet's side of the story, and the ledger beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.absences = Absences(GONE_S, SETTLED_S)
        self.containers: list[Container] = []
        self.now_s = 1000.0
        self.pods = 0
        self.gpus: list[Gpu] = []

    @initialize(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), online=st.integers(0, 15))
    def start(self, sizes: list[int], online: int) -> None:
        self.gpus = [
            Gpu(f"GPU-{i}", f"gpu{i}", size, size, bool(online >> i & 1)) for i, size in enumerate(sizes)
        ]

    def free(self) -> set[str]:
        """Ids that the kubelet may give: Healthy, and no container's."""
        health = units.healthy_units(self.ledger, MEMORY, self.gpus)
        taken = {token for container in self.containers for token in container.ids}
        return {token for token, healthy in health.items() if healthy} - taken

    def allocate(self, ids: frozenset[str], pod: str, name: str, listed: bool) -> Entry:
        used_before = self.ledger.used(MEMORY)
        reused = [self.ledger.holder(MEMORY, token) for token in ids]
        made = units.allocate_units(
            self.ledger, MEMORY, ids, self.gpus, now_s=self.now_s, library="/opt/valve/1"
        )
        entry = made.entry
        self.absences.allocated(entry.id)
        assert len(entry.gpus) == 1
        assert entry.tokens == ids
        assert entry.units == len(ids)
        again = units.allocate_units(
            self.ledger, MEMORY, ids, self.gpus, now_s=self.now_s, library="/opt/valve/1"
        )
        assert (again.repeated, again.entry.gpus, again.entry.id) == (True, entry.gpus, entry.id), (
            "idempotent"
        )
        if not entry.shortage and not any(reused) and not made.repeated:
            (gpu,) = (gpu for gpu in self.gpus if gpu.id == entry.gpus[0])
            assert room(gpu, used_before) >= len(ids), "an entry that is not short fits"
        owner = ContainerName("ns", pod, name)
        self.containers.append(Container(owner, ids, entry.gpus[0], listed))
        return entry

    @rule(data=st.data(), seed=st.integers(0, 2**16), ask=st.booleans(), init=st.booleans())
    def admit(self, data: st.DataObject, seed: int, ask: bool, init: bool) -> None:
        """A pod arrives; its containers ask one after the other."""
        free = self.free()
        if not free:
            return
        shuffle = random.Random(seed)
        self.pods += 1
        pod = f"pod-{self.pods}"
        size = data.draw(st.integers(1, len(free)), label="units")
        ids = self.pick(free, frozenset(), size, shuffle, ask)
        self.allocate(ids, pod, "init" if init else "main", listed=not init)
        if init:
            more = self.free()
            again = data.draw(st.integers(1, len(ids) + len(more)), label="units after init")
            kept = frozenset(shuffle.sample(sorted(ids), min(len(ids), again)))
            picked = self.pick(more, kept, again, shuffle, ask)
            holder = self.containers[-1]
            self.allocate(picked, pod, "main", listed=True)
            holder.ids -= picked

    def pick(
        self, free: set[str], reused: frozenset[str], size: int, shuffle: random.Random, ask: bool
    ) -> frozenset[str]:
        picked = set(reused)
        if ask:
            preferred = units.prefer_units(self.ledger, MEMORY, free | picked, reused, size, self.gpus)
            assert len(preferred) == len(set(preferred)) == size
            assert set(preferred) <= free | picked
            assert picked <= set(preferred)
            picked |= set(preferred)
        rest = sorted(free - picked)
        shuffle.shuffle(rest)
        return frozenset(picked | set(rest[: size - len(picked)]))

    @precondition(lambda self: self.containers)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A pod ends. The kubelet may give its ids away at once; the ledger has not heard."""
        pod = data.draw(st.sampled_from(sorted({c.owner.pod for c in self.containers})), label="pod")
        self.containers = [c for c in self.containers if c.owner.pod != pod]

    @rule(data=st.data())
    def burst(self, data: st.DataObject) -> None:
        """Online takes memory, or gives it back."""
        self.gpus = [
            Gpu(g.id, g.short, g.units, data.draw(st.integers(0, g.units), label=g.id), g.online)
            for g in self.gpus
        ]

    @rule(passed_s=st.sampled_from([0.1, 1.0, 40.0]), may_release=st.booleans())
    def hear(self, passed_s: float, may_release: bool) -> None:
        """A look at pod-resources."""
        self.now_s += passed_s
        listing = {(MEMORY, c.owner): c.ids for c in self.containers if c.listed and c.ids}
        before = {entry.id for entry in self.ledger}
        reconcile(
            self.ledger, listing, self.absences, self.gpus, seats=SEATS, now_s=self.now_s,
            at_s=self.now_s, may_release=may_release, library="/opt/valve/1",
        )  # fmt: skip
        assert may_release or before <= {entry.id for entry in self.ledger}
        for container in self.containers:
            if container.listed and container.ids:
                holder = self.ledger.holder(MEMORY, min(container.ids))
                assert holder is not None
                assert (holder.owner, holder.tokens) == (container.owner, container.ids)

    @rule()
    def restart(self) -> None:
        """The plugin ends and reads its file."""
        text = json.dumps(document.write(self.ledger, self.gpus))
        read, known = document.read(json.loads(text))
        assert list(read) == list(self.ledger)
        assert [gpu.id for gpu in known] == [gpu.id for gpu in self.gpus]
        self.ledger, self.absences = read, Absences(GONE_S, SETTLED_S)

    @invariant()
    def no_id_twice(self) -> None:
        seen = [token for entry in self.ledger for token in entry.tokens]
        assert len(seen) == len(set(seen))

    @invariant()
    def memory_is_counted_once(self) -> None:
        used = self.ledger.used(MEMORY)
        assert sum(used.values()) == len(self.ledger.tokens(MEMORY))

    @invariant()
    def a_container_keeps_its_gpu(self) -> None:
        """Answers are never taken back, and no order of ids makes one pod's memory another's."""
        for container in self.containers:
            for token in container.ids:
                holder = self.ledger.holder(MEMORY, token)
                if holder is not None:
                    assert holder.gpus == (container.gpu,)

    @invariant()
    def what_is_promised_is_there(self) -> None:
        """As many free ids are Healthy as GiB are left, unless the GPUs have fewer free ids."""
        health = units.healthy_units(self.ledger, MEMORY, self.gpus)
        taken = self.ledger.tokens(MEMORY)
        used = self.ledger.used(MEMORY)
        left = sum(max(0, room(gpu, used)) for gpu in self.gpus)
        free = [token for token, healthy in health.items() if token not in taken and healthy]
        assert len(free) == min(left, sum(1 for token in health if token not in taken))
        assert all(health[token] for token in taken if token in health)


Node.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestNode = Node.TestCase
