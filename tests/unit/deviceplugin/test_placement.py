# SPDX-License-Identifier: Apache-2.0
"""Tables: on which GPU a request goes, and which ids the kubelet is asked to take."""

from __future__ import annotations

from collections import Counter

import pytest

from valve_api.container import ContainerName
from valve_deviceplugin.allocator import units
from valve_deviceplugin.allocator.ledger import Entry, Ledger
from valve_deviceplugin.allocator.placement import Choice, Gpu, choose

MEMORY = "memory"


def gpu(name: str, size: int, lent: int | None = None, online: bool = False) -> Gpu:
    return Gpu(name, name.lower(), size, size if lent is None else lent, online)


def ids(name: str, *ranges: range) -> list[str]:
    return [units.unit_id(name.lower(), index) for span in ranges for index in span]


@pytest.mark.parametrize(
    ("description", "size", "gpus", "used", "wished", "expected"),
    [
        ("the only one", 4, [gpu("A", 8)], {}, {}, Choice("A", 0)),
        ("best fit", 4, [gpu("A", 8), gpu("B", 5)], {}, {}, Choice("B", 0)),
        ("best fit counts what is used", 4, [gpu("A", 8), gpu("B", 16)], {"B": 12}, {}, Choice("B", 0)),
        ("best fit counts what is lent", 4, [gpu("A", 8), gpu("B", 16, 4)], {}, {}, Choice("B", 0)),
        ("beside online before best fit", 4, [gpu("A", 8, 8, True), gpu("B", 4)], {}, {}, Choice("A", 0)),
        ("a fit before online", 9, [gpu("A", 8, 8, True), gpu("B", 16)], {}, {}, Choice("B", 0)),
        ("an exact fit is a fit", 8, [gpu("A", 8), gpu("B", 7)], {}, {}, Choice("A", 0)),
        ("best fit among those that fit", 4, [gpu("A", 3), gpu("B", 8), gpu("C", 5)], {}, {}, Choice("C", 0)),
        ("equal: by name", 4, [gpu("B", 8), gpu("A", 8)], {}, {}, Choice("A", 0)),
        ("all ids of one GPU", 4, [gpu("A", 8, 8, True), gpu("B", 16)], {}, {"B": 4}, Choice("B", 0)),
        ("unless it is full", 4, [gpu("A", 8), gpu("B", 8)], {"B": 6}, {"B": 4}, Choice("A", 0)),
        ("ids of two: best fit", 4, [gpu("A", 8), gpu("B", 6)], {}, {"A": 3, "B": 1}, Choice("B", 0)),
        ("ids of two, equal: the most", 4, [gpu("A", 8), gpu("B", 8)], {}, {"A": 1, "B": 3}, Choice("B", 0)),
        ("none fits: the most room", 9, [gpu("A", 8), gpu("B", 6, 6, True)], {}, {"B": 9}, Choice("A", 1)),
        ("nothing lent", 3, [gpu("A", 8, 0)], {}, {}, Choice("A", 3)),
        ("more given than is lent", 3, [gpu("A", 8, 2)], {"A": 6}, {}, Choice("A", 3)),
    ],
)  # fmt: skip
def test_choose(
    description: str,
    size: int,
    gpus: list[Gpu],
    used: dict[str, int],
    wished: dict[str, int],
    expected: Choice,
) -> None:
    assert choose(size, gpus, used, wished) == expected, description


@pytest.mark.parametrize(
    ("description", "available", "must", "size", "expected"),
    [
        ("whole on the smallest that fits", ids("A", range(8)) + ids("B", range(5)), [], 4, {"B": 4}),
        ("whole on the large one", ids("A", range(8)) + ids("B", range(5)), [], 6, {"A": 6}),
        ("fewer ids than room: filled up", ids("A", range(2)) + ids("B", range(5)), [], 6, {"A": 2, "B": 4}),
        ("a fragmented request", ids("A", range(8)) + ids("B", range(5)), [], 10, {"A": 8, "B": 2}),
        ("more than there is", ids("A", range(2)), [], 4, {"A": 2}),
        ("must is respected", ids("A", range(8)) + ids("B", range(5)), ids("A", range(2)), 4,
         {"A": 2, "B": 2}),
        ("nothing but must", ids("A", range(8)), ids("A", range(3)), 3, {"A": 3}),
    ],
)  # fmt: skip
def test_prefer_units(
    description: str, available: list[str], must: list[str], size: int, expected: dict[str, int]
) -> None:
    """`must` of ids that no entry has: nothing is known of them, so they are not where the rest must go."""
    gpus = [gpu("A", 8), gpu("B", 5)]
    picked = units.prefer_units(Ledger(), MEMORY, available, must, size, gpus)
    assert units.named_gpus(picked, gpus) == Counter(expected), description
    assert set(must) <= set(picked) <= set(available) | set(must), description
    assert len(set(picked)) == len(picked), description


def entry(number: int, gpu_id: str, tokens: list[str], owner: str = "") -> Entry:
    named = ContainerName("ns", owner, "main") if owner else None
    return Entry(number, MEMORY, (gpu_id,), len(tokens), frozenset(tokens), named)


def test_must_of_an_init_container_draws_the_rest_to_its_gpu() -> None:
    """And its units count as free for the pod that has them."""
    ledger = Ledger([entry(1, "A", ids("A", range(6)))])
    gpus = [gpu("A", 8), gpu("B", 8, 8, True)]
    available = ids("A", range(8)) + ids("B", range(8))
    picked = units.prefer_units(ledger, MEMORY, available, ids("A", range(6)), 8, gpus)
    assert sorted(picked) == ids("A", range(8))


def test_a_gpu_whose_ids_are_used_elsewhere_gives_them_first() -> None:
    """A's memory is taken under B's ids: who goes to B beyond B's own ids takes A's spare ones."""
    ledger = Ledger([entry(1, "A", ids("B", range(4)))])
    gpus = [gpu("A", 8), gpu("B", 8), gpu("C", 2)]
    available = ids("A", range(8)) + ids("B", range(4, 8)) + ids("C", range(2))
    picked = units.prefer_units(ledger, MEMORY, available, [], 6, gpus)
    assert units.named_gpus(picked, gpus) == {"B": 4, "A": 2}


@pytest.mark.parametrize(
    ("description", "used", "must", "size", "expected"),
    [
        ("the least offline memory first", {"A": 4, "B": 1}, [], 1, ["c-seat"]),
        ("two seats", {"A": 4, "B": 1}, [], 2, ["c-seat", "b-seat"]),
        ("must is respected", {"A": 4, "B": 1}, ["a-seat"], 2, ["a-seat", "c-seat"]),
        ("equal: by name", {}, [], 2, ["a-seat", "b-seat"]),
    ],
)
def test_prefer_seats(
    description: str, used: dict[str, int], must: list[str], size: int, expected: list[str]
) -> None:
    gpus = [gpu("A", 8), gpu("B", 8), gpu("C", 8)]
    available = [units.seat_id(g.short) for g in gpus]
    assert units.prefer_seats(used, available, must, size, gpus) == expected, description


@pytest.mark.parametrize(
    ("description", "lent", "entries", "expected"),
    [
        ("what is lent", {"A": 3, "B": 2}, [], {"A": 3, "B": 2}),
        ("what is held stays healthy", {"A": 0, "B": 2}, [("A", ids("A", range(5)))], {"A": 5, "B": 2}),
        ("held counts against lent", {"A": 3, "B": 2}, [("A", ids("A", range(2)))], {"A": 3, "B": 2}),
        ("held elsewhere: the other's ids are lent", {"A": 8, "B": 8}, [("A", ids("B", range(6)))],
         {"A": 8, "B": 8}),
        ("the last ids can be short of room", {"A": 8, "B": 8},
         [("A", ids("A", range(8))), ("A", ids("B", range(8)))], {"A": 8, "B": 8}),
    ],
)  # fmt: skip
def test_healthy_units(
    description: str, lent: dict[str, int], entries: list[tuple[str, list[str]]], expected: dict[str, int]
) -> None:
    gpus = [gpu("A", 8, lent["A"]), gpu("B", 8, lent["B"])]
    ledger = Ledger([entry(number, where, tokens) for number, (where, tokens) in enumerate(entries, 1)])
    health = units.healthy_units(ledger, MEMORY, gpus)
    assert len(health) == 16
    assert units.named_gpus([t for t, healthy in health.items() if healthy], gpus) == expected, description


def test_an_owned_entry_whose_ids_come_again_is_over() -> None:
    """Its pod ended and nobody told us; the rest of its memory is free at once."""
    ledger = Ledger([entry(1, "A", ids("A", range(6)), owner="gone")])
    made = units.allocate_units(
        ledger, MEMORY, frozenset(ids("A", range(2))), [gpu("A", 8)], now_s=1.0, library="/l"
    )
    assert [e.id for e in ledger] == [made.entry.id]
    assert ledger.used(MEMORY) == {"A": 2}


def test_an_unowned_entry_keeps_the_ids_that_are_not_taken() -> None:
    """It may be an init container of the same pod."""
    ledger = Ledger([entry(1, "A", ids("A", range(6)))])
    units.allocate_units(
        ledger, MEMORY, frozenset(ids("A", range(2))), [gpu("A", 8)], now_s=1.0, library="/l"
    )
    assert ledger.used(MEMORY) == {"A": 6}
    assert sorted(len(e.tokens) for e in ledger) == [2, 4]


@pytest.mark.parametrize(
    ("description", "gpus", "known", "expected"),
    [
        ("the first eight digits", ["GPU-8f1c2d3e-0a0b-4c4d-8e8f-000000000001"], {}, ["8f1c2d3e"]),
        ("as many as make a difference",
         ["GPU-8f1c2d3e-0a0b-4c4d-8e8f-000000000001", "GPU-8f1c2d3e-0a1b-4c4d-8e8f-000000000002"], {},
         ["8f1c2d3e", "8f1c2d3e-0"]),
        ("a MIG device", ["MIG-5c0ffee5-0a0b-4c4d-8e8f-000000000001"], {}, ["5c0ffee5"]),
        ("the cpu device", ["cpu"], {}, ["cpu"]),
        ("what is known stays", ["GPU-8f1c2d3e-0a0b-4c4d-8e8f-000000000001"],
         {"GPU-8f1c2d3e-0a0b-4c4d-8e8f-000000000001": "old"}, ["old"]),
        ("no path, no space", ["a/b c"], {}, ["a-b-c"]),
    ],
)  # fmt: skip
def test_short_names(description: str, gpus: list[str], known: dict[str, str], expected: list[str]) -> None:
    names = units.short_names(gpus, known)
    assert [names[gpu] for gpu in gpus] == expected, description
    assert len(set(names.values())) == len(names)


def test_ids_have_the_kubelets_length() -> None:
    long = units.short_names(["x" * 200, "x" * 199], {})
    assert len(set(long.values())) == 2
    assert all(len(units.unit_id(short, 9999)) <= units.ID_CHARACTERS_MAX for short in long.values())
