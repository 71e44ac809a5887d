# SPDX-License-Identifier: Apache-2.0
"""The plugin looks before it wraps; stand-ins from the standard library take vLLM's place."""

from __future__ import annotations

import pytest

from valve_runtime import vllm

CASES = [
    ("all there", (("json", None, "dumps", ("obj",)), ("json", "JSONDecoder", "decode", ("s",))), []),
    ("a name that only has to exist", (("json", "JSONDecoder", "decode", None),), []),
    ("no such module", (("no_such_module", None, "f", ()),), ["no_such_module"]),
    ("no such class", (("json", "Nobody", "f", ()),), ["json.Nobody.f"]),
    ("no such method", (("json", "JSONDecoder", "nothing", ()),), ["json.JSONDecoder.nothing"]),
    ("a parameter is gone", (("json", None, "loads", ("s", "gone")),), ["json.loads(gone)"]),
]


@pytest.mark.parametrize(("hooks", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_missing_hooks(hooks: tuple[object, ...], expected: list[str]) -> None:
    assert vllm.missing_hooks(hooks) == expected


def test_wrap_keeps_names_and_classmethods() -> None:
    class Subject:
        def plain(self, x: int) -> int:
            """Doc."""
            return x

        @classmethod
        def of_class(cls, x: int) -> tuple[type, int]:
            return cls, x

    def add_one(original):  # type: ignore[no-untyped-def]
        return lambda owner, x: original(owner, x + 1)

    vllm.wrap(Subject, "plain", add_one)
    vllm.wrap(Subject, "of_class", add_one)
    assert Subject().plain(1) == 2
    assert Subject.plain.__doc__ == "Doc."
    assert Subject.of_class(1) == (Subject, 2)


def test_nothing_happens_outside_a_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VALVE_SOCKET", raising=False)
    vllm.register()
    assert vllm._plugin is None
    monkeypatch.setenv("VALVE_SOCKET", "/nowhere")  # but no libvalve in this process: no role
    vllm.register()
    assert vllm._plugin is None
