# SPDX-License-Identifier: Apache-2.0
"""What the webhook answers, as kopf turns it into a JSON patch, and what main says to bad flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kopf
import pytest

from valve_operator.admission import Defaults
from valve_operator.cases import OFFLINE, Case
from valve_operator.main import main
from valve_operator.webhook import Webhook


def webhook() -> Webhook:
    return Webhook(9443, Path("crt"), Path("key"), Defaults("valve-online", "valve-offline"))


def answer(pod: dict[str, Any]) -> dict[str, Any]:
    """Path → value of the JSON patch."""
    patch = kopf.Patch(body=kopf.Body(pod))  # type: ignore[arg-type]
    webhook().mutate(pod, patch)
    return {entry["path"]: entry.get("value", entry["op"]) for entry in patch.as_json_patch()}


def test_the_patch_says_only_what_changes() -> None:
    pod = Case("", OFFLINE, {}).pod()
    pod["spec"]["priority"] = 0
    changes = answer(pod)
    assert set(changes) == {
        "/metadata/labels/valve.io~1workload",
        "/spec/affinity",
        "/spec/containers/0/resources",
        "/spec/priority",
        "/spec/priorityClassName",
        "/spec/tolerations",
    }
    assert changes["/spec/priority"] == "remove"


def test_a_pod_without_annotations_gets_no_patch() -> None:
    assert answer(Case("", {}, {}).pod()) == {}


def test_a_refusal_carries_every_sentence_and_is_counted() -> None:
    served = webhook()
    pod = Case("", {"workload": "offline", "container": "x"}, {}).pod()
    with pytest.raises(kopf.AdmissionError) as refusal:
        served.mutate(pod, kopf.Patch())
    assert str(refusal.value).startswith("Valve refuses this pod: valve.io/container is")
    assert "valve.io/gpu-memory is missing" in str(refusal.value)
    assert refusal.value.code == 422
    assert served.answered.refused == 1


POLICIES: list[tuple[str, dict[str, Any], str]] = [
    ("good", {}, ""),
    ("an unknown field", {"memory": {"slab": 1}}, "spec.memory.slab: no such field; did you mean slabSize?"),
    (
        "sizes that do not fit the device",
        {"cpuDevice": {"memory": "1Gi"}, "memory": {"slabSize": "1Gi"}},
        "slabs",
    ),
]


@pytest.mark.parametrize(("case", "spec", "sentence"), POLICIES, ids=[case[0] for case in POLICIES])
def test_policies(case: str, spec: dict[str, Any], sentence: str) -> None:
    policy = {
        "apiVersion": "valve.io/v1alpha1",
        "kind": "ColocationPolicy",
        "metadata": {"name": "p", "aFieldOfTheFuture": 1},
        "spec": spec,
        "status": {"aFieldOfAnotherVersion": 1},
    }
    if not sentence:
        webhook().validate(policy)
        return
    with pytest.raises(kopf.AdmissionError, match=sentence):
        webhook().validate(policy)


FLAGS = ["--namespace=ns", "--node-templates=/none", "--owner=o"]
BAD = [
    (
        "no certificate",
        ["--webhook-port=9443"],
        "--webhook-cert is missing: --webhook-port needs a certificate",
    ),
    (
        "a certificate that is not there",
        ["--webhook-port=9443", "--webhook-cert=/none.crt", "--webhook-key=/none.key"],
        "--webhook-cert /none.crt",
    ),
    ("no way to the API server", [], "not in a pod, so give --kubeconfig FILE"),
    ("a kubeconfig that is not there", ["--kubeconfig=/none"], "/none"),
]


@pytest.mark.parametrize(("case", "flags", "sentence"), BAD, ids=[case[0] for case in BAD])
def test_flags_that_cannot_be_used_end_it_with_a_sentence(
    case: str,
    flags: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main([*FLAGS, *flags]) == 2
    assert sentence in capsys.readouterr().err
