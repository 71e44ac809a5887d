# SPDX-License-Identifier: Apache-2.0
"""The ledger against the kubelet's list: who owns what, what is over, and what we had not known."""

from __future__ import annotations

import pytest

from valve_api.container import ContainerName, Listing
from valve_deviceplugin.allocator.ledger import Entry, Ledger
from valve_deviceplugin.allocator.placement import Gpu
from valve_deviceplugin.allocator.reconcile import Absences, Changes, reconcile

MEMORY, SEATS = "memory", "seats"
GPUS = [Gpu("A", "a", 8, 8, False), Gpu("B", "b", 8, 8, False)]
GONE_S, RELEASE_S = 3.0, 30.0
ONE, TWO = ContainerName("ns", "one", "main"), ContainerName("ns", "two", "main")


def tokens(*numbers: int, short: str = "a") -> frozenset[str]:
    return frozenset(f"{short}-{number:04d}" for number in numbers)


def patience() -> Absences:
    return Absences(GONE_S, RELEASE_S)


def look(
    ledger: Ledger, listing: Listing, now_s: float, absences: Absences | None = None, release: bool = True
) -> Changes:
    return reconcile(
        ledger, listing, absences or patience(), GPUS, seats=SEATS, now_s=now_s,
        at_s=5.0, may_release=release, library="/opt/valve/2",
    )  # fmt: skip


def test_an_owner_is_learnt_once() -> None:
    ledger = Ledger([Entry(1, MEMORY, ("A",), 2, tokens(0, 1), at_s=0.0)])
    listing = {(MEMORY, ONE): tokens(0, 1)}
    assert [entry.owner for entry in look(ledger, listing, 1.0).owned] == [ONE]
    revision = ledger.revision
    assert not look(ledger, listing, 2.0)
    assert ledger.revision == revision, "nothing is written when nothing changed"


def test_the_same_ids_under_another_name_are_the_others_now() -> None:
    ledger = Ledger([Entry(1, MEMORY, ("A",), 2, tokens(0, 1), ONE)])
    assert look(ledger, {(MEMORY, TWO): tokens(0, 1)}, 1.0).owned[0].owner == TWO


SEEN, ABSENT, UNSURE = "seen", "absent", "the list is incomplete"


@pytest.mark.parametrize(
    ("description", "owner", "looks", "released_at"),
    [
        ("gone", ONE, [(10.0, ABSENT), (12.9, ABSENT), (13.0, ABSENT)], 13.0),
        ("one look is not enough, however late", ONE, [(100.0, ABSENT)], None),
        ("seen once in between", ONE, [(10.0, ABSENT), (12.0, SEEN), (13.0, ABSENT)], None),
        ("an incomplete list says nothing", ONE, [(10.0, ABSENT), (14.0, UNSURE)], None),
        ("and starts the wait again", ONE,
         [(10.0, ABSENT), (12.0, UNSURE), (13.0, ABSENT), (16.0, ABSENT)], 16.0),
        ("never listed: an admission takes longer", None, [(10.0, ABSENT), (39.0, ABSENT)], None),
        ("never listed for long enough", None, [(10.0, ABSENT), (40.0, ABSENT)], 40.0),
        ("given to another meanwhile", None, [(10.0, ABSENT), (39.0, "allocated"), (41.0, ABSENT)], None),
    ],
)  # fmt: skip
def test_release(
    description: str, owner: ContainerName | None, looks: list[tuple[float, str]], released_at: float | None
) -> None:
    ledger = Ledger([Entry(1, MEMORY, ("A",), 2, tokens(0, 1), owner)])
    absences = patience()
    released = []
    for now_s, what in looks:
        if what == "allocated":
            absences.allocated(1)
            continue
        listing = {(MEMORY, ONE): tokens(0, 1)} if what == SEEN else {}
        if look(ledger, listing, now_s, absences, release=what != UNSURE).released:
            released.append(now_s)
    assert released == ([] if released_at is None else [released_at]), description
    assert len(ledger) == (0 if released else 1)


def test_what_we_did_not_know_is_adopted_where_its_ids_say() -> None:
    """The ledger's file was lost; the GPU is a guess, right unless the ids had been remapped."""
    ledger = Ledger()
    ids = tokens(0, 1, short="b") | tokens(5)
    (entry,) = look(ledger, {(MEMORY, ONE): ids}, 1.0).adopted
    assert (entry.gpus, entry.units, entry.owner, entry.library) == (("B",), 3, ONE, "/opt/valve/2")


def test_adoption_believes_the_ledger_before_the_ids() -> None:
    """Two of the ids are booked, on A though they are called b."""
    ledger = Ledger([Entry(1, MEMORY, ("A",), 2, tokens(0, 1, short="b"), library="/opt/valve/1")])
    (entry,) = look(ledger, {(MEMORY, ONE): tokens(0, 1, 2, short="b")}, 1.0).adopted
    assert (entry.gpus, entry.library) == (("A",), "/opt/valve/1")
    assert ledger.used(MEMORY) == {"A": 3}


def test_seats_are_adopted_without_memory() -> None:
    ids = frozenset({"a-seat", "b-seat"})
    (entry,) = look(Ledger(), {(SEATS, ONE): ids}, 1.0).adopted
    assert (entry.gpus, entry.units) == (("A", "B"), 0)


def test_ids_of_a_gpu_that_is_gone_are_left_alone() -> None:
    ledger = Ledger()
    assert not look(ledger, {(MEMORY, ONE): tokens(0, short="gone")}, 1.0)
    assert len(ledger) == 0


def test_one_owner_may_have_both_resources() -> None:
    ledger = Ledger(
        [Entry(1, MEMORY, ("A",), 1, tokens(0)), Entry(2, SEATS, ("A",), 0, frozenset({"a-seat"}))]
    )
    listing = {(MEMORY, ONE): tokens(0), (SEATS, ONE): frozenset({"a-seat"})}
    assert len(look(ledger, listing, 1.0).owned) == 2
