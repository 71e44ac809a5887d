# SPDX-License-Identifier: Apache-2.0
"""The control plane is the real thing: it judges our CRDs, users and service accounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import build
from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.kubectl import Refused

ROOT = Path(__file__).resolve().parents[3]


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "valve.io/v1alpha1", "kind": "ColocationPolicy", "metadata": {"name": name},
        "spec": {"nodeSelector": {"gpu": "yes"}} | spec,
    }  # fmt: skip


def test_it_is_the_kubernetes_that_go_mod_names(control_plane: ControlPlane) -> None:
    wanted = build.kubernetes_version((ROOT / "e2e/cluster/kube/go.mod").read_text())
    version = json.loads(control_plane.kubectl("version", "-o", "json"))
    assert version["serverVersion"]["gitVersion"] == version["clientVersion"]["gitVersion"] == wanted


def test_the_shipped_policy_is_accepted_and_defaulted(control_plane: ControlPlane) -> None:
    control_plane.kubectl.apply(ROOT / "examples/policy.yaml", policy("bare"))
    try:
        written, bare = (control_plane.kubectl.get("colo", name)["spec"] for name in ("inference", "bare"))
        del written["nodeSelector"], bare["nodeSelector"]
        assert bare == written, "examples/policy.yaml says that it writes out every default"
    finally:
        control_plane.kubectl("delete", "colo", "inference", "bare")


@pytest.mark.parametrize(
    ("description", "spec", "sentence"),
    [
        ("a reservation that cannot grow", {"memory": {"reservation": {"factor": 1.0}}}, "never grows"),
        ("bounds in the wrong order", {"compute": {"cooldown": {"min": "2s", "max": "1s"}}}, "min must"),
        ("a lease that is too short", {"compute": {"lease": "1ms"}}, "must be from 20ms to 1m"),
        ("a misspelt field", {"compute": {"coolDown": {}}}, 'unknown field "spec.compute.coolDown"'),
        ("an unknown route", {"compute": {"route": "magic"}}, 'Unsupported value: "magic"'),
    ],
)  # fmt: skip
def test_a_bad_policy_is_refused_with_a_sentence(
    control_plane: ControlPlane, description: str, spec: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Refused) as refused:
        control_plane.kubectl.apply(policy("bad", **spec))
    assert sentence in refused.value.sentence, description


def test_a_service_account_has_its_own_rights_and_no_more(control_plane: ControlPlane) -> None:
    admin = control_plane.kubectl
    admin("create", "namespace", "rights")
    admin.until("the default service account", ["sa", "default", "-n", "rights"], lambda _: True)
    admin("create", "role", "reader", "-n", "rights", "--verb=get,list", "--resource=configmaps")
    admin(
        "create", "rolebinding", "reader", "-n", "rights", "--role=reader", "--serviceaccount=rights:default"
    )
    account = control_plane.service_account("rights", "default")
    assert account.items("configmaps", "-n", "rights")
    with pytest.raises(
        Refused, match='User "system:serviceaccount:rights:default" cannot list resource "secrets"'
    ):
        account.items("secrets", "-n", "rights")
    admin("delete", "namespace", "rights")  # returns when the controller manager has emptied it
