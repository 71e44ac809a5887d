# SPDX-License-Identifier: Apache-2.0
"""`helm test`: each way in which an installation can look healthy and not be is told apart.

Gap: the API server is a table of answers here; tests/integration/chart and e2e ask a real one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[3] / "charts/valve/files/selftest.py"
Answer = tuple[int, dict[str, Any]]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("valve_selftest", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


selftest = load()
READY = {
    "metadata": {"name": "inference"},
    "status": {"nodes": 2, "conditions": [{"type": "Ready", "status": "True"}]},
}


class Cluster:
    """A healthy installation; a test breaks one thing."""

    def __init__(self) -> None:
        self.policies: Answer = (200, {"items": [READY]})
        self.nodes = [{"metadata": {"name": "a"}, "status": {"allocatable": {"valve.io/online-gpu": "8"}}}]
        self.admit: Callable[[dict[str, Any], dict[str, Any]], Answer] = self.admitted

    def admitted(self, pod: dict[str, Any], annotations: dict[str, Any]) -> Answer:
        workload = annotations.get("valve.io/workload")
        if workload not in (None, "online", "offline"):
            return 422, {"message": "write online or offline"}
        if workload:
            resource = "valve.io/online-gpu" if workload == "online" else "valve.io/offline-memory-gib"
            pod["spec"]["containers"][0]["resources"] = {"limits": {resource: "1"}}
        return 201, pod

    def __call__(self, method: str, path: str, body: dict[str, Any] | None) -> Answer:
        if path.endswith("/colocationpolicies"):
            return self.policies
        if path.endswith("/colocationnodes"):
            return 200, {"items": []}
        if path == "/api/v1/nodes":
            return 200, {"items": self.nodes}
        assert method == "POST"
        assert path == "/api/v1/namespaces/default/pods?dryRun=All", "nothing may ever be made"
        assert body
        return self.admit(body, body["metadata"]["annotations"])


def outcome(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit status, and the names of the checks that failed."""
    test = selftest.SelfTest(cluster, "default", "image")
    checks = [
        ("CRDs", test.crds), ("plain pods", test.untouched), ("admission", test.mutated),
        ("refusal", test.refused), ("capacity", test.capacity),
    ]  # fmt: skip
    code = selftest.run(checks, patience_s=0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks)
    return code, [line.split()[1].rstrip(":") for line in lines if line.startswith("FAIL")]


def test_a_healthy_installation_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(Cluster(), capsys) == (0, [])


def test_without_a_policy_nothing_is_asked_of_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster()
    cluster.policies, cluster.nodes = (200, {"items": []}), []
    assert outcome(cluster, capsys) == (0, [])


@pytest.mark.parametrize(
    ("description", "policies", "failing"),
    [
        ("no CRDs", (404, {}), ["CRDs", "capacity"]),
        ("no right", (403, {"message": "no"}), ["CRDs", "capacity"]),
    ],
)
def test_what_the_api_server_does_not_serve_is_told(
    description: str, policies: Answer, failing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster()
    cluster.policies = policies
    assert outcome(cluster, capsys) == (1, failing), description


def never_mutates(pod: dict[str, Any], annotations: dict[str, Any]) -> Answer:
    return (422, {}) if annotations.get("valve.io/workload") == "sometimes" else (201, pod)


def refuses_all(_pod: dict[str, Any], _annotations: dict[str, Any]) -> Answer:
    return 500, {"message": "no endpoints available"}


def takes_all(pod: dict[str, Any], annotations: dict[str, Any]) -> Answer:
    if annotations.get("valve.io/workload") == "sometimes":
        return 201, pod
    return Cluster().admitted(pod, annotations)


def touches_all(pod: dict[str, Any], annotations: dict[str, Any]) -> Answer:
    return Cluster().admitted(pod, annotations or {"valve.io/workload": "online"})


@pytest.mark.parametrize(
    ("description", "admit", "failing"),
    [
        ("a webhook that does nothing", never_mutates, ["admission"]),
        ("a webhook that is in everybody's way", refuses_all, ["plain", "admission"]),
        ("contradictions get through", takes_all, ["refusal"]),
        ("pods that say nothing are changed", touches_all, ["plain"]),
    ],
)
def test_admission_that_is_not_as_it_should_be_is_told(
    description: str,
    admit: Callable[[dict[str, Any], dict[str, Any]], Answer],
    failing: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster = Cluster()
    cluster.admit = admit
    assert outcome(cluster, capsys) == (1, failing), description


def test_a_ready_policy_without_capacity_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster()
    cluster.nodes = [{"metadata": {"name": "a"}, "status": {"allocatable": {"cpu": "8"}}}]
    assert outcome(cluster, capsys) == (1, ["capacity"])
