# SPDX-License-Identifier: Apache-2.0
"""The committed CRDs and the reference page are what the models say, in the form the API server takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from valve_api.generate import RESOURCES, Resource, crd, main, outputs, stale
from valve_api.model import ApiModel
from valve_api.policy import ColocationPolicy, PolicySpec
from valve_api.reference import model_in, policy_reference

ROOT = Path(__file__).resolve().parents[3]
KINDS = pytest.mark.parametrize("resource", RESOURCES, ids=[resource.kind for resource in RESOURCES])


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in a schema, with its path."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from nodes(schema[name], f"{path}[]")


def root(resource: Resource) -> dict[str, Any]:
    schema: dict[str, Any] = crd(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def test_committed_files_are_up_to_date() -> None:
    assert stale(ROOT) == [], "run python -m valve_api.generate"
    assert main(["--check", "--root", str(ROOT)]) == 0


def test_check_finds_a_change_a_missing_file_and_no_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", "--root", str(tmp_path)]) == 2
    (tmp_path / "pyproject.toml").touch()
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 0
    for path in outputs():
        file = tmp_path / path
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("slab", "slap", 1), encoding="utf-8")
        capsys.readouterr()
        assert main(["--check", "--root", str(tmp_path)]) == 1
        assert path in capsys.readouterr().err
        file.write_text(text, encoding="utf-8")


@KINDS
def test_schema_is_structural(resource: Resource) -> None:
    """No $ref, no pydantic words, a type or int-or-string at every node, bounds on every text."""
    for path, schema in nodes(root(resource)):
        assert "$ref" not in schema
        assert not {"anyOf", "allOf", "title", "const", "exclusiveMinimum", "exclusiveMaximum"} & set(schema)
        int_or_string = schema.get("x-kubernetes-int-or-string")
        assert ("type" in schema) != bool(int_or_string), path
        assert not ("properties" in schema and "additionalProperties" in schema), path
        for rule in schema.get("x-kubernetes-validations", ()):
            assert rule["message"]
            assert "self" in rule["rule"]


@KINDS
def test_every_text_and_list_that_rules_read_is_bounded(resource: Resource) -> None:
    """The API server estimates the cost of a rule by these and refuses the CRD where they miss."""
    for path, schema in nodes(root(resource)["properties"]["spec"]):
        if schema.get("type") == "string":
            assert {"maxLength", "enum", "format"} & set(schema), path
        if "additionalProperties" in schema:
            assert "maxProperties" in schema, path
        if schema.get("type") == "array":
            assert "maxItems" in schema, path


@KINDS
def test_every_field_is_described(resource: Resource) -> None:
    for path, schema in nodes(root(resource)):
        if path.startswith((".spec", ".status")) and not path.endswith("[]"):
            assert schema.get("description"), path


def models(model: type[ApiModel]) -> Iterator[type[ApiModel]]:
    yield model
    for field in model.model_fields.values():
        if inner := model_in(field):
            yield from models(inner)


def test_every_rule_between_fields_is_in_the_crd() -> None:
    rules = [rule.cel for model in models(PolicySpec) for rule in model.rules]
    assert len(rules) >= 6
    written = [
        rule["rule"]
        for _, schema in nodes(root(RESOURCES[0]))
        for rule in schema.get("x-kubernetes-validations", ())
    ]
    assert set(rules) <= set(written)


def test_a_default_object_has_every_default() -> None:
    """The API server checks an object's rules against its default as it is written."""
    for path, schema in nodes(root(RESOURCES[0])):
        if isinstance(schema.get("default"), dict) and "properties" in schema:
            inner = {name for name, value in schema["properties"].items() if "default" in value}
            assert inner == set(schema["default"]), path


def test_defaults_of_the_crd_are_the_defaults_of_the_models() -> None:
    """What the API server fills in and what the agent fills in for a file must be the same policy."""
    spec = root(RESOURCES[0])["properties"]["spec"]
    document = {"apiVersion": "valve.io/v1alpha1", "kind": "ColocationPolicy", "metadata": {"name": "x"}}
    filled = ColocationPolicy.model_validate({**document, "spec": spec["default"]})
    assert filled.spec == ColocationPolicy.model_validate(document).spec


@KINDS
def test_kubectl_has_what_it_shows(resource: Resource) -> None:
    definition = crd(resource)
    version = definition["spec"]["versions"][0]
    assert definition["metadata"]["name"] == f"{resource.plural}.valve.io"
    assert definition["spec"]["scope"] == "Cluster"
    assert version["subresources"] == {"status": {}}
    known = {path for path, _ in nodes(root(resource))}
    for column in version["additionalPrinterColumns"]:
        path = column["jsonPath"].split("[?")[0]
        assert path in known or path == ".metadata.creationTimestamp", column
    names = [column["name"] for column in version["additionalPrinterColumns"]]
    assert "Ready" in names
    assert names[-1] == "Age"


def test_short_name_is_colo() -> None:
    assert crd(RESOURCES[0])["spec"]["names"]["shortNames"] == ["colo"]


@KINDS
def test_conditions_merge_by_type(resource: Resource) -> None:
    conditions = root(resource)["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]
    assert "type" in conditions["items"]["required"]
    assert "observedGeneration" in conditions["items"]["properties"]


@KINDS
def test_committed_yaml_has_no_anchor(resource: Resource) -> None:
    text = (ROOT / f"crds/valve.io_{resource.plural}.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == crd(resource)
    assert "&id" not in text


def test_reference_names_every_field() -> None:
    page = policy_reference()
    for model in models(PolicySpec):
        for name, field in model.model_fields.items():
            alias = field.alias or name
            assert f"| `{alias}` |" in page or f".{alias}\n" in page, alias
