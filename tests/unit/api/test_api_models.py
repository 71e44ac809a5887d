# SPDX-License-Identifier: Apache-2.0
"""Every setting documents itself, every default is valid, and the names agree with the protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import valve_api
from valve_api import names
from valve_api.model import ApiModel
from valve_api.node import ColocationNode, NodeSpec, NodeStatus
from valve_api.policy import ColocationPolicy, PolicySpec, PolicyStatus
from valve_api.reference import model_in
from valve_api.settings import settings_from

ROOT = Path(__file__).resolve().parents[3]


def leaves(model: type[ApiModel], path: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = model_in(field)
        if inner is None:
            yield f"{path}.{field.alias or name}", field
        else:
            yield from leaves(inner, f"{path}.{field.alias or name}")


SETTINGS = dict(leaves(PolicySpec, "spec"))


@pytest.mark.parametrize("path", SETTINGS)
def test_setting_says_what_and_why(path: str) -> None:
    extra = SETTINGS[path].json_schema_extra
    assert isinstance(extra, dict), "declare it with setting()"
    for part in ("what", "why"):
        text = str(extra[part])
        assert len(text) > 10, f"{path} has no {part}"
        assert text.endswith("."), f"{path}: {part} is no sentence"
    annotation = SETTINGS[path].annotation
    is_enum = isinstance(annotation, type) and hasattr(annotation, "__members__")
    assert extra["unit"] or is_enum, f"{path} has no unit"


def test_there_are_settings() -> None:
    assert len(SETTINGS) >= 20


def test_defaults_are_what_their_own_text_reads_as() -> None:
    """Defaults are not validated when used, so this is where a bad one shows."""
    written = PolicySpec().model_dump(mode="json", by_alias=True, exclude_none=True)
    assert PolicySpec.model_validate(written) == PolicySpec()


def test_models_are_immutable_and_closed() -> None:
    spec = PolicySpec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.memory.slab_size = 1  # type: ignore[assignment]
    with pytest.raises(ValidationError, match="Extra inputs"):
        PolicySpec.model_validate({"memory": {"slab": 1}})


def node_object() -> dict[str, Any]:
    own = {"node_selector", "priority"}
    spec = PolicySpec().model_dump(mode="json", by_alias=True, exclude=own, exclude_none=True)
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND_NODE,
        "metadata": {"name": "node-1", "uid": "1234", "generation": 4},
        "spec": {**spec, "policy": {"name": "fleet", "generation": 3}},
        "status": {
            "observedGeneration": 4,
            "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            ],
            "gpus": [
                {
                    "id": "GPU-1",
                    "memory": "80Gi",
                    "reservation": "2Gi",
                    "route": "agent",
                    "paused": True,
                    "tenants": [{"name": "ns/pod", "workload": "offline", "memory": "24Gi"}],
                    "preemptLatency": {"p50Us": 120, "p99Us": 400, "maxUs": 700, "samples": 1000},
                }
            ],
            "gpuCount": 1,
        },
    }


def test_a_node_round_trips_and_gives_settings() -> None:
    node = ColocationNode.model_validate(node_object())
    assert node.status is not None
    assert node.status.gpus[0].preempt_latency.p99_us == 400
    again = ColocationNode.model_validate_json(node.model_dump_json(by_alias=True, exclude_none=True))
    assert again == node
    assert settings_from(node.spec, node.metadata.name, 80 << 30).slabs == 1536, "60 % of it"


def test_a_node_spec_is_a_policy_spec_without_what_selects_nodes() -> None:
    own = {"node_selector", "priority"}
    assert set(NodeSpec.model_fields) - {"policy"} == set(PolicySpec.model_fields) - own


@pytest.mark.parametrize("status", [PolicyStatus, NodeStatus])
def test_status_can_be_empty_and_carries_conditions(status: type[ApiModel]) -> None:
    empty = status()
    assert {"observed_generation", "conditions"} <= set(status.model_fields)
    assert status.model_validate(empty.model_dump(mode="json", by_alias=True)) == empty


def test_a_policy_from_the_api_server_is_read() -> None:
    """With everything that a server adds to metadata."""
    document = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND_POLICY,
        "metadata": {
            "name": "fleet",
            "uid": "1234",
            "resourceVersion": "99",
            "generation": 2,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "managedFields": [{"manager": "kubectl"}],
            "annotations": {"a": "b"},
            "finalizers": ["x"],
        },
        "spec": {},
        "status": {"observedGeneration": 2},
    }
    policy = ColocationPolicy.model_validate(document)
    assert policy.metadata.generation == 2
    assert policy.status == PolicyStatus(observedGeneration=2)  # type: ignore[call-arg]


def test_names_agree_with_the_protocol_header() -> None:
    header = (ROOT / "runtime/native/include/valve_protocol.h").read_text(encoding="utf-8")
    slabs = re.search(r"#define VALVE_SLABS_MAX (\d+)u", header)
    assert slabs is not None
    assert int(slabs[1]) == names.ARENA_SLABS_MAX


def test_names_that_pods_and_dashboards_rely_on() -> None:
    assert names.ANNOTATION_WORKLOAD == "valve.io/workload"
    assert names.ANNOTATION_GPU_MEMORY == "valve.io/gpu-memory"
    assert names.RESOURCE_ONLINE_GPU == "valve.io/online-gpu"
    assert names.RESOURCE_OFFLINE_MEMORY == "valve.io/offline-memory-gib"
    assert [str(workload) for workload in names.Workload] == ["online", "offline"]


def test_every_public_name_can_be_had() -> None:
    assert sorted(valve_api._HOME) == sorted(valve_api.__all__)
    for name in valve_api.__all__:
        assert getattr(valve_api, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        valve_api.nothing  # noqa: B018
