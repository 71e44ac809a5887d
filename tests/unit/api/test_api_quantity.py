# SPDX-License-Identifier: Apache-2.0
"""Quantities, durations and shares: what is read, what is refused, and exact round trips."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valve_api.errors import UnitError
from valve_api.quantity import DEVICE_BYTES_MAX, MAX_INT, Duration, Quantity, Share

QUANTITIES = [
    ("plain bytes", "4096", 4096, "4Ki"),
    ("zero", "0", 0, "0"),
    ("binary suffix", "1536Mi", 1536 << 20, "1536Mi"),
    ("larger unit when exact", "24576Mi", 24 << 30, "24Gi"),
    ("decimal suffix", "80G", 80 * 10**9, "80G"),
    ("thousand is decimal", "1000", 1000, "1k"),
    ("1024 is binary", "1024", 1024, "1Ki"),
    ("odd number stays plain", "1025", 1025, "1025"),
    ("exponent", "12e6", 12_000_000, "12M"),
    ("E with digits is an exponent", "1E3", 1000, "1k"),
    ("E without digits is exa", "1E", 10**18, "1E"),
    ("largest", str(MAX_INT), MAX_INT, str(MAX_INT)),
    ("an int, as YAML reads it", 2097152, 2 << 20, "2Mi"),
]


@pytest.mark.parametrize(("case", "given", "value", "canonical"), QUANTITIES, ids=[c[0] for c in QUANTITIES])
def test_quantity_is_read(case: str, given: str | int, value: int, canonical: str) -> None:
    quantity = Quantity(given)
    assert int(quantity) == value, case
    assert str(quantity) == f"{quantity}" == canonical


BAD_QUANTITIES = [
    ("no number", "Mi", "write 64Mi"),
    ("empty", "", "write 64Mi"),
    ("MiB names the unit that was meant", "1536MiB", "did you mean Mi?"),
    ("GB names the unit that was meant", "80GB", "did you mean G?"),
    ("wrong case names the unit that was meant", "1gi", "did you mean Gi?"),
    ("milli is explained", "100m", "m is a thousandth"),
    ("a duration's unit", "10ms", "ms is not a unit of memory"),
    ("a space", "24 Gi", "write 64Mi"),
    ("negative text", "-1Gi", "write 64Mi"),
    ("negative int", -1, "negative"),
    ("a fraction gets the whole number to write", "1.5Gi", "write 1536Mi"),
    ("a fraction of a byte", "0.3", "has no fraction"),
    ("beyond 63 bits", "9223372036854775808", "too large"),
    ("exponent beyond 63 bits", "1e99", "too large"),
    ("very long text is not even read", "1" * 10_000, "not a quantity"),
    ("a YAML float", 1.5, "a fraction without a unit"),
    ("true", True, "true or false"),
    ("null", None, "nothing"),
    ("a list", [1], "not allowed here"),
    ("digits of another script", "٣Gi", "write 64Mi"),
]


@pytest.mark.parametrize(("case", "given", "says"), BAD_QUANTITIES, ids=[c[0] for c in BAD_QUANTITIES])
def test_quantity_is_refused(case: str, given: object, says: str) -> None:
    with pytest.raises(UnitError) as refusal:
        Quantity(given)
    assert says in str(refusal.value), case


DURATIONS = [
    ("milliseconds", "10ms", 10**7, "10ms"),
    ("seconds", "1s", 10**9, "1s"),
    ("minutes", "2m", 120 * 10**9, "2m"),
    ("joined", "1m30s", 90 * 10**9, "1m30s"),
    ("joined up to hours", "1h0m5s", 3605 * 10**9, "1h5s"),
    ("microseconds", "500us", 500_000, "500us"),
    ("nanoseconds", "7ns", 7, "7ns"),
    ("a fraction", "1.5s", 1_500_000_000, "1500ms"),
    ("seconds become minutes", "90s", 90 * 10**9, "1m30s"),
    ("zero", "0s", 0, "0s"),
]


@pytest.mark.parametrize(("case", "given", "value", "canonical"), DURATIONS, ids=[c[0] for c in DURATIONS])
def test_duration_is_read(case: str, given: str, value: int, canonical: str) -> None:
    assert int(Duration(given)) == int(Duration.from_policy(given)) == value, case
    assert str(Duration(given)) == canonical


BAD_DURATIONS = [
    ("a number without unit", "500", "needs a unit"),
    ("an int without unit, as YAML reads it", 500, "needs a unit"),
    ("zero without unit", 0, "needs a unit"),
    ("a space", "5 s", "not a duration"),
    ("an unknown unit", "5d", "not a duration"),
    ("a word", "soon", "not a duration"),
    ("half read", "5s!", "not a duration"),
    ("negative", "-5s", "not a duration"),
    ("finer than a nanosecond", "0.5ns", "finer than a nanosecond"),
    ("beyond 63 bits", "9999999999h", "too large"),
    ("very long text is not even read", "1s" * 1000, "not a duration"),
    ("a float", 0.5, "a fraction without a unit"),
    ("null", None, "nothing"),
]


@pytest.mark.parametrize(("case", "given", "says"), BAD_DURATIONS, ids=[c[0] for c in BAD_DURATIONS])
def test_duration_is_refused(case: str, given: object, says: str) -> None:
    with pytest.raises(UnitError) as refusal:
        Duration.from_policy(given)
    assert says in str(refusal.value), case
    assert "10ms" in str(refusal.value) or "too large" in str(refusal.value), "no example"


SHARES = [
    ("half of a device", "50%", 1000, 500),
    ("percents round down", "33%", 100, 33),
    ("nothing", "0%", 1000, 0),
    ("everything", "100%", 1000, 1000),
    ("bytes do not depend on the device", "4Mi", 1000, 4 << 20),
    ("an int is bytes", 4096, 1000, 4096),
]


@pytest.mark.parametrize(("case", "given", "device", "value"), SHARES, ids=[c[0] for c in SHARES])
def test_share_of_a_device(case: str, given: str | int, device: int, value: int) -> None:
    assert Share.parse(given).of(device) == value, case


BAD_SHARES = [
    ("more than all", "101%", "from 0% to 100%"),
    ("negative", "-5%", "from 0% to 100%"),
    ("a fraction of a percent", "12.5%", "whole number from 0% to 100%"),
    ("a leading zero", "05%", "from 0% to 100%"),
    ("a space", "50 %", "from 0% to 100%"),
    ("a word", "half", "a percentage of the device such as 50%"),
    ("a float", 0.5, "a percentage of the device such as 50%"),
    ("beyond any device", "17Ti", "at most 16Ti"),
]


@pytest.mark.parametrize(("case", "given", "says"), BAD_SHARES, ids=[c[0] for c in BAD_SHARES])
def test_share_is_refused(case: str, given: object, says: str) -> None:
    with pytest.raises(UnitError) as refusal:
        Share.parse(given)
    assert says in str(refusal.value), case


@given(st.integers(0, MAX_INT))
def test_quantity_round_trip(value: int) -> None:
    text = str(Quantity(value))
    assert int(Quantity(text)) == value
    assert str(Quantity(text)) == text
    assert len(text) <= len(str(value)), "the canonical form is never longer than the plain number"


@given(st.integers(0, (1 << 23) - 1), st.sampled_from(["Ki", "Mi", "Gi", "Ti", "k", "M", "G", "T"]))
def test_quantity_round_trip_with_units(count: int, unit: str) -> None:
    value = Quantity(f"{count}{unit}")
    power = "kmgt".index(unit[0].lower()) + 1
    assert int(value) == count * (1024 if unit.endswith("i") else 1000) ** power
    assert Quantity(str(value)) == value


@given(st.integers(0, MAX_INT))
def test_duration_round_trip(value: int) -> None:
    text = str(Duration(value))
    assert int(Duration.from_policy(text)) == value
    assert str(Duration(text)) == text


@given(
    st.integers(0, 10**6), st.integers(0, 999), st.sampled_from([("s", 10**9), ("ms", 10**6), ("us", 1000)])
)
def test_duration_fractions_are_exact(whole: int, thousandths: int, unit: tuple[str, int]) -> None:
    suffix, scale = unit
    assert Duration(f"{whole}.{thousandths:03d}{suffix}") == whole * scale + thousandths * scale // 1000


@given(st.one_of(st.integers(0, 100).map(lambda n: f"{n}%"), st.integers(0, DEVICE_BYTES_MAX)))
def test_share_round_trip(given_share: str | int) -> None:
    share = Share.parse(given_share)
    assert Share.parse(str(share)) == share
    assert Share.parse(share) is share


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (Quantity, Duration.from_policy, Share.parse):
        try:
            value = read(text)
        except UnitError:
            continue
        assert read(str(value)) == value


def test_values_survive_pickle_and_copy() -> None:
    for value in (Quantity("24Gi"), Duration("1m30s"), Share.parse("50%"), Share.parse("4Mi")):
        for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
            assert twin == value
            assert str(twin) == str(value)
            assert type(twin) is type(value)
