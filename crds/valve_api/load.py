# SPDX-License-Identifier: Apache-2.0
"""Reads a ColocationPolicy from a YAML file, or says everything that is wrong with it.

Called once in main of the agent and of the command line. Every refusal is one
PolicyError that lists each problem with the field's path, what was given and what is
allowed. No environment variable, no default location.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from valve_api.errors import PolicyError, Problem
from valve_api.model import Rule
from valve_api.names import API_VERSION, KIND_POLICY
from valve_api.policy import ColocationPolicy
from valve_api.settings import settings_from

FILE_BYTES_MAX = 1 << 20
GIVEN_CHARS_MAX = 60


def load_policy(path: str | Path) -> ColocationPolicy:
    """The policy in a file of one YAML document. Raises PolicyError."""
    source = str(path)
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise _refuse(source, "there is no such file; name a ColocationPolicy YAML file") from None
    except IsADirectoryError:
        raise _refuse(source, "is a directory; name one ColocationPolicy YAML file in it") from None
    except OSError as error:
        raise _refuse(source, f"cannot be read: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise _refuse(source, "is larger than 1 MiB; a policy has a few dozen lines")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refuse(source, f"is not UTF-8 text (byte {error.start}); write a YAML file") from None
    return parse_policy(text, source)


def parse_policy(text: str, source: str = "policy") -> ColocationPolicy:
    """The policy in a text of one YAML document; `source` heads the message. Raises PolicyError."""
    return policy_from(_document(text, source), source)


def policy_from(document: object, source: str = "policy") -> ColocationPolicy:
    """The policy in a decoded object, as the API server sends it. Raises PolicyError."""
    if not isinstance(document, dict):
        raise _refuse(source, f"holds {_kind_of(document)}, not an object; {_HEAD}")
    kind, version = document.get("kind"), document.get("apiVersion")
    if kind != KIND_POLICY:
        raise PolicyError(source, [Problem("kind", _show(kind), f"must be {KIND_POLICY}; {_HEAD}")])
    if version != API_VERSION:
        raise PolicyError(source, [Problem("apiVersion", _show(version), f"must be {API_VERSION}")])
    try:
        policy = ColocationPolicy.model_validate(document)
    except ValidationError as error:
        raise PolicyError(source, problems_of(error, ColocationPolicy)) from None
    if policy.spec.cpu_device is not None:  # the only device a policy knows itself: does it fit?
        settings_from(policy.spec, policy.metadata.name, source=source)
    return policy


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """pydantic's errors in the words of this project; `model` is what was validated."""
    found: list[Problem] = []
    for detail in error.errors(include_url=False):
        found.extend(_problems(detail["type"], detail["loc"], detail, model))
    return found


_HEAD = f"it must begin with apiVersion: {API_VERSION} and kind: {KIND_POLICY}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (the second would win silently) and aliases (no bombs)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "a policy has no aliases; write the value out", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name != "<<" and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field {name!r} is given twice; keep one", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _document(text: str, source: str) -> object:
    try:
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise _refuse(source, f"is not valid YAML{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise _refuse(source, f"is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise _refuse(source, "is not a policy: it is nested too deeply") from None
    except ValueError as error:  # a date such as 2026-99-99, an int of too many digits
        raise _refuse(source, f"is not valid YAML: {error}") from None
    if not documents:
        raise _refuse(source, f"is empty; {_HEAD}")
    if len(documents) > 1:
        raise _refuse(source, f"holds {len(documents)} documents; keep one policy per file")
    return documents[0]


def _problems(
    kind: str, loc: tuple[int | str, ...], detail: Any, model: type[BaseModel]
) -> Iterator[Problem]:
    context: dict[str, Any] = detail.get("ctx", {})
    path = _path(loc)
    given = _show(detail["input"])
    if kind == "rules":
        broken: list[tuple[Rule, object]] = context["broken"]
        for rule, value in broken:
            yield Problem(f"{path}.{rule.field}", _show(value), rule.message)
    elif kind == "extra_forbidden":
        yield Problem(path, "", _unknown(str(loc[-1]), _fields_at(model, loc[:-1])))
    elif kind == "missing":
        yield Problem(path, "", "missing; it must be given")
    elif kind == "value_error":
        yield Problem(path, given, str(context["error"]))
    elif kind in _SENTENCES:
        yield Problem(path, given, _SENTENCES[kind](context))
    else:
        yield Problem(path, given, str(detail["msg"]))


def _one_of(context: dict[str, Any]) -> str:
    return "must be " + str(context["expected"]).replace("'", "")


_SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "invalid_key": lambda c: "a field's name must be text",
    "enum": _one_of,
    "literal_error": _one_of,
    "greater_than_equal": lambda c: f"must be at least {c['ge']:g}",
    "less_than_equal": lambda c: f"must be at most {c['le']:g}",
    "int_type": lambda c: "must be a whole number, without quotes and unit",
    "float_type": lambda c: "must be a number, without quotes and unit",
    "string_type": lambda c: "must be text; put it in quotes",
    "model_type": lambda c: "must be an object of fields, one per line",
    "dict_type": lambda c: "must be lines of name: value",
    "list_type": lambda c: "must be a list",
    "too_long": lambda c: f"must have at most {c['max_length']} entries",
    "string_too_short": lambda c: f"must have at least {c['min_length']} character(s)",
    "string_too_long": lambda c: f"must have at most {c['max_length']} characters",
    "string_pattern_mismatch": lambda c: (
        "must be lower case letters, digits, - and ., with a letter or digit at both ends"
    ),
}
"""pydantic's error types that a policy can meet, as sentences; tests/unit/api names a case for each."""


def _unknown(name: str, fields: list[str]) -> str:
    by_lower = {field.lower(): field for field in fields}
    near = difflib.get_close_matches(name.replace("_", "").lower(), by_lower, n=1, cutoff=0.6)
    meant = f"did you mean {by_lower[near[0]]}? " if near else ""
    return f"no such field; {meant}allowed: {', '.join(fields)}"


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the object at `loc`, as written in YAML."""
    for step in loc:
        for name, field in model.model_fields.items():
            if step in (name, field.alias):
                inner = [
                    t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_model(t)
                ]
                if inner:
                    model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _path(loc: tuple[int | str, ...]) -> str:
    """`spec.weights["a.b"]`, `status.gpus[0]`: the steps as an operator writes them."""
    path = ""
    for step in loc:
        if step == "[key]":
            path += " (the name)"
        elif isinstance(step, int):
            path += f"[{step}]"
        elif step.replace("_", "").replace("-", "").isalnum():
            path += f".{step}" if path else step
        else:
            path += f"[{json.dumps(step)}]"
    return path


def _show(value: object) -> str:
    """A value as YAML would write it on one line, cut short."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:  # a date as a key, which YAML can say and JSON cannot
        text = str(value)
    return text if len(text) <= GIVEN_CHARS_MAX else text[: GIVEN_CHARS_MAX - 1] + "…"


def _kind_of(value: object) -> str:
    return {str: "a text", list: "a list", int: "a number", float: "a number", bool: "true or false"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _refuse(source: str, sentence: str) -> PolicyError:
    return PolicyError(source, [Problem("", "", sentence)])
