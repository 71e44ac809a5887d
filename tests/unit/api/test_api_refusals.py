# SPDX-License-Identifier: Apache-2.0
"""A bad policy file is refused with the field's path, what was given and what is allowed."""

from __future__ import annotations

import copy
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from valve_api import PolicyError, load_policy, parse_policy, policy_from
from valve_api.load import _SENTENCES, FILE_BYTES_MAX

GOOD: dict[str, Any] = {
    "apiVersion": "valve.io/v1alpha1",
    "kind": "ColocationPolicy",
    "metadata": {"name": "test"},
    "spec": {"cpuDevice": {"memory": "1536Mi"}, "memory": {"slabSize": "2Mi"}},
}


def changed(path: str, value: object) -> dict[str, Any]:
    """GOOD with one field set; dots between the levels."""
    document = copy.deepcopy(GOOD)
    place = document
    *parents, last = path.split(".")
    for step in parents:
        place = place.setdefault(step, {})
    place[last] = value
    return document


FIELDS = [
    # description, field, what is given, path in the message (None: the field), what the message says
    ("a field nobody knows", "spec.memory.slabs", 3, None, "no such field; did you mean slabSize?"),
    ("snake case", "spec.memory.slab_size", "2Mi", None, "did you mean slabSize?"),
    ("a misspelt object", "spec.guardrail", {}, None, "did you mean guardrails?"),
    ("nothing near: every name is listed", "spec.zzz", 1, None, "allowed: cpuDevice, compute, memory"),
    ("a misspelt field of metadata", "metadata.lables", {}, None, "did you mean labels?"),
    ("a namespace on a cluster-scoped object", "metadata.namespace", "x", None, "no such field"),
    ("MiB", "spec.memory.slabSize", "2MiB", None, "did you mean Mi?"),
    ("a size that is no quantity", "spec.cpuDevice.memory", "much", None, "write 64Mi, 1536Mi, 24Gi"),
    (
        "slab not a multiple of 2Mi",
        "spec.memory.slabSize",
        "3Mi",
        None,
        "from 2Mi to 1Gi and a multiple of 2Mi",
    ),
    ("slab too large", "spec.memory.slabSize", "2Gi", None, "from 2Mi to 1Gi"),
    ("slab of zero", "spec.memory.slabSize", 0, None, "from 2Mi to 1Gi"),
    ("device not whole slabs", "spec.cpuDevice.memory", "1537Mi", None, "multiple of memory.slabSize"),
    (
        "device of too few slabs",
        "spec.memory.slabSize",
        "512Mi",
        "spec.cpuDevice.memory",
        "from 8 to 65536 slabs",
    ),
    ("device smaller than allowed", "spec.cpuDevice.memory", "2Mi", None, "from 16Mi to 16Ti"),
    ("device without a size", "spec.cpuDevice", {}, "spec.cpuDevice.memory", "missing"),
    (
        "min above max in bytes",
        "spec.memory.reservation",
        {"min": "2Gi", "max": "1Gi"},
        "spec.memory.reservation.min",
        "must not be larger than max",
    ),
    ("min above max in percent", "spec.memory.reservation.min", "60%", None, "must not be larger than max"),
    (
        "min above max once the device is known",
        "spec.memory.reservation",
        {"min": "1Gi", "max": "10%"},
        "spec.memory.reservation.min",
        "must not be larger than max (10%); this device has 1536Mi",
    ),
    ("max above the device", "spec.memory.reservation.max", "2Gi", None, "larger than the device"),
    ("floor that leaves offline nothing", "spec.memory.onlineFloor", "100%", None, "leaves offline no slab"),
    ("default below one slab", "spec.offline.defaultMemory", "1Mi", None, "smaller than one slab (2Mi)"),
    ("percentage above 100", "spec.memory.onlineFloor", "101%", None, "from 0% to 100%"),
    ("factor of one", "spec.memory.reservation.factor", 1, None, "must be more than 1"),
    ("factor too large", "spec.memory.reservation.factor", 17, None, "must be at most 16"),
    ("factor in quotes", "spec.memory.reservation.factor", "2", None, "must be a number, without quotes"),
    ("factor that is no number", "spec.compute.cooldown.factor", float("nan"), None, "must be at"),
    ("decrease of nothing", "spec.memory.reservation.decrease", 0, None, "must be more than 0"),
    ("decrease of nothing in percent", "spec.memory.reservation.decrease", "0%", None, "must be more than 0"),
    (
        "a duration without a unit",
        "spec.compute.lease",
        500,
        None,
        "a duration needs a unit; write 500us, 10ms",
    ),
    ("a duration in quotes without a unit", "spec.compute.lease", "500", None, "a duration needs a unit"),
    ("lease too short to hold", "spec.compute.lease", "1ms", None, "from 20ms to 1m"),
    ("recovery shorter than a few retries", "spec.compute.recoveryGrace", "100ms", None, "from 300ms to 5m"),
    ("cooldown min above max", "spec.compute.cooldown.min", "2s", None, "must not be longer than max"),
    (
        "cooldown max below the default min",
        "spec.compute.cooldown.max",
        "1ms",
        "spec.compute.cooldown.min",
        '"5ms": must not be longer',
    ),
    ("cooldown factor below one", "spec.compute.cooldown.factor", 0.5, None, "must be at least 1"),
    (
        "an unknown route",
        "spec.compute.route",
        "magic",
        None,
        "auto, agent, in-process, patched or launch-gate",
    ),
    (
        "an enum in another case",
        "spec.guardrails.unknownProcesses",
        "refuse",
        None,
        "must be Report or Refuse",
    ),
    ("no process at all", "spec.offline.maxProcesses", 0, None, "must be at least 1"),
    ("half a process", "spec.offline.maxProcesses", 1.5, None, "must be a whole number"),
    ("true is no number", "spec.offline.maxProcesses", True, None, "must be a whole number"),
    (
        "a weight of zero",
        "spec.offline.weights",
        {"low": 0},
        "spec.offline.weights.low",
        "must be at least 1",
    ),
    (
        "too many weights",
        "spec.offline.weights",
        {f"c{n}": 1 for n in range(65)},
        None,
        "must have at most 64 entries",
    ),
    (
        "a weight without a name",
        "spec.offline.weights",
        {"": 1},
        'spec.offline.weights[""] (the name)',
        "at least 1 character",
    ),
    (
        "a label that YAML reads as true",
        "spec.nodeSelector",
        {"gpu": True},
        "spec.nodeSelector.gpu",
        "must be text; put it in quotes",
    ),
    (
        "a label with dots in its name",
        "spec.nodeSelector",
        {"a.b/c": 1},
        'spec.nodeSelector["a.b/c"]',
        "put it in quotes",
    ),
    (
        "a label too long",
        "spec.nodeSelector",
        {"gpu": "x" * 64},
        "spec.nodeSelector.gpu",
        "at most 63 characters",
    ),
    ("a list where names are expected", "spec.nodeSelector", ["gpu"], None, "must be lines of name: value"),
    ("a number where an object is expected", "spec.compute", 3, None, "must be an object of fields"),
    ("nothing where an object is expected", "spec.memory", None, None, "null: must be an object of fields"),
    ("a name Kubernetes would not take", "metadata.name", "My_Policy", None, "lower case"),
    ("finalizers that are no list", "metadata.finalizers", "x", None, "must be a list"),
    ("a number as a name", "spec.memory", {3: 1}, "spec.memory[3]", "a field's name must be text"),
    ("a date as a name", "spec.compute.lease", {date(2026, 1, 1): 1}, None, "write 500us"),
    ("no name", "metadata", {}, "metadata.name", "missing"),
    ("another kind", "kind", "Pod", None, '"Pod": must be ColocationPolicy'),
    ("another version", "apiVersion", "valve.io/v1", None, '"valve.io/v1": must be valve.io/v1alpha1'),
]


@pytest.mark.parametrize(("case", "field", "value", "path", "says"), FIELDS, ids=[c[0] for c in FIELDS])
def test_bad_field(case: str, field: str, value: object, path: str | None, says: str) -> None:
    with pytest.raises(PolicyError) as refusal:
        policy_from(changed(field, value), "test.yaml")
    problems = {problem.path: problem for problem in refusal.value.problems}
    assert (path or field) in problems, f"{case}: {refusal.value}"
    assert says in str(problems[path or field]), case
    assert str(refusal.value).startswith("test.yaml is refused")


def test_the_good_policy_is_good() -> None:
    """Or every case above would prove nothing."""
    assert policy_from(GOOD).spec.memory.slab_size == 2 << 20


TEXTS = [
    ("empty", "", "is empty; it must begin with apiVersion: valve.io/v1alpha1"),
    ("only a comment", "# nothing\n", "is empty"),
    ("only separators", "---\n---\n", "is empty"),
    ("a text", "hello", "holds a text, not an object"),
    ("a list", "- a\n", "holds a list"),
    ("a number", "3", "holds a number"),
    ("two policies", yaml.safe_dump_all([GOOD, GOOD]), "holds 2 documents; keep one policy per file"),
    ("a tab", "spec:\n\tcompute: {}\n", "is not valid YAML (line 2, column 1)"),
    ("an open bracket", "spec: [", "is not valid YAML (line 1"),
    ("a field twice", yaml.safe_dump(GOOD) + "spec: {}\n", "'spec' is given twice"),
    ("a Python object", "a: !!python/object:os.system {}", "is not valid YAML"),
    ("a control character", "a: \x01", "is not valid YAML"),
    ("an alias", "a: &b [1]\nc: *b", "(line 2, column 4): a policy has no aliases"),
    ("a list that holds itself", "a: &b [*b]", "a policy has no aliases"),
    ("a date that is none", "a: 2026-99-99", "is not valid YAML"),
    ("nested without end", "[" * 5000, "nested too deeply"),
    ("no kind", "apiVersion: valve.io/v1alpha1", "kind: null: must be ColocationPolicy"),
    ("a list as a key", "? [a]\n: b\n", "is not valid YAML"),
]


@pytest.mark.parametrize(("case", "text", "says"), TEXTS, ids=[c[0] for c in TEXTS])
def test_bad_text(case: str, text: str, says: str) -> None:
    with pytest.raises(PolicyError) as refusal:
        parse_policy(text, "test.yaml")
    assert says in str(refusal.value), case
    assert len(str(refusal.value).splitlines()) == 1


def test_every_mistake_is_listed_at_once() -> None:
    document = changed("spec.compute.lease", 500)
    document["spec"]["memory"]["slabs"] = 3
    document["spec"]["offline"] = {"maxProcesses": 0}
    with pytest.raises(PolicyError) as refusal:
        policy_from(document, "test.yaml")
    assert [problem.path for problem in refusal.value.problems] == [
        "spec.compute.lease",
        "spec.memory.slabs",
        "spec.offline.maxProcesses",
    ]
    first, *lines = str(refusal.value).splitlines()
    assert first == "test.yaml is refused, 3 problems:"
    assert len(lines) == 3


def test_two_broken_rules_of_one_object_are_two_problems() -> None:
    with pytest.raises(PolicyError) as refusal:
        policy_from(changed("spec.memory.reservation", {"min": "60%", "factor": 1.0}))
    assert len(refusal.value.problems) == 2


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(PolicyError) as refusal:
        policy_from(changed("spec.memory.slabSize", "9" * 500))
    assert len(str(refusal.value)) < 300


def test_files_that_cannot_be_policies(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe\xff")
    (tmp_path / "large.yaml").write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    for name, says in (
        ("missing.yaml", "there is no such file"),
        (".", "is a directory"),
        ("binary.yaml", "is not UTF-8 text"),
        ("large.yaml", "is larger than 1 MiB"),
    ):
        with pytest.raises(PolicyError) as refusal:
            load_policy(tmp_path / name)
        assert says in str(refusal.value)
        assert str(tmp_path) in str(refusal.value)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_text("\ufeff" + yaml.safe_dump(GOOD), encoding="utf-8")
    assert load_policy(tmp_path / "bom.yaml").metadata.name == "test"


def test_no_refusal_speaks_pydantic() -> None:
    """Every case above is worded here, and every sentence here is met by a case."""
    met = set()
    for _, field, value, _, _ in FIELDS:
        with pytest.raises(PolicyError) as refusal:
            policy_from(changed(field, value))
        text = str(refusal.value)
        for word in ("Input should", "input_value", "pydantic", "Value error", "valid dictionary"):
            assert word not in text
        met |= {kind for kind, sentence in _SENTENCES.items() if _opening(sentence) in text}
    assert met == set(_SENTENCES)


def _opening(sentence: Any) -> str:
    """The fixed part of a sentence, up to its first number."""
    numbers = dict.fromkeys(("ge", "le", "max_length", "min_length"), 0)
    words = sentence({**numbers, "expected": "'auto'"})
    return str(words).split("0")[0].split("auto")[0]


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(
        [
            "metadata",
            "metadata.name",
            "spec",
            "spec.memory",
            "spec.memory.reservation",
            "spec.memory.slabSize",
            "spec.memory.onlineFloor",
            "spec.compute.lease",
            "spec.nodeSelector",
            "spec.offline.weights",
        ]
    ),
    yaml_values,
)
def test_any_value_is_taken_or_refused_with_its_path(field: str, value: object) -> None:
    try:
        policy_from(changed(field, value))
    except PolicyError as refusal:
        for problem in refusal.problems:
            assert problem.path.startswith((field, "spec.cpuDevice"))


@given(st.text(max_size=200))
def test_any_text_is_taken_or_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        parse_policy(text)
