# SPDX-License-Identifier: Apache-2.0
"""The chart on a real API server: install, upgrade, uninstall, and what stays.

No pod runs here (there is no node): that running pods live through all of it is e2e. What is asked here is
what those scenarios rest on: nothing is deleted and made again, the certificate stays, CRDs change and stay,
DaemonSets go when the ConfigMap that owns them goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_chart import CHART, NAMESPACE, RELEASE, HelmFailed, helm, install, node_templates, render, uninstall

from e2e.cluster.control_plane import ControlPlane

SECRET = ("secret", "valve-webhook-tls", "-n", NAMESPACE)


@pytest.fixture
def plane(bare_plane: ControlPlane) -> Iterator[ControlPlane]:
    yield bare_plane
    uninstall(bare_plane)


def upgrade(plane: ControlPlane, *arguments: str | Path, chart: Path = CHART) -> None:
    helm("upgrade", RELEASE, chart, "-n", NAMESPACE, *arguments, kubeconfig=plane.kubeconfig)


def uids(plane: ControlPlane) -> dict[str, str]:
    """uid of every object of the release."""
    manifest = helm("get", "manifest", RELEASE, "-n", NAMESPACE, kubeconfig=plane.kubeconfig)
    found = {}
    for entry in yaml.safe_load_all(manifest):
        if entry:
            kind, name = entry["kind"], entry["metadata"]["name"]
            there = plane.kubectl.get(kind, name, "-n", entry["metadata"].get("namespace", "default"))
            found[f"{kind}/{name}"] = there["metadata"]["uid"]
    return found


def test_an_upgrade_makes_nothing_anew_and_keeps_the_certificate(plane: ControlPlane) -> None:
    install(plane)
    before, secret = uids(plane), plane.kubectl.get(*SECRET)
    upgrade(plane, "--set=operator.logLevel=debug,agent.image.tag=v2")
    assert uids(plane) == before
    assert plane.kubectl.get(*SECRET)["data"] == secret["data"]
    bundles = {
        hook["clientConfig"]["caBundle"]
        for kind in ("mutating", "validating")
        for hook in plane.kubectl.get(f"{kind}webhookconfiguration", "valve")["webhooks"]
    }
    assert bundles == {secret["data"]["ca.crt"]}
    template = plane.kubectl.get("configmap", "valve-node", "-n", NAMESPACE)["data"]["agent.yaml"]
    assert "image: valve-agent:v2" in template


def test_a_certificate_near_its_end_is_renewed(plane: ControlPlane) -> None:
    install(plane)
    secret = plane.kubectl.get(*SECRET)
    plane.kubectl("annotate", *SECRET, "valve.io/renew-after=1", "--overwrite")
    upgrade(plane, "--force-conflicts")  # the annotation is kubectl's now
    renewed = plane.kubectl.get(*SECRET)
    assert renewed["data"]["tls.crt"] != secret["data"]["tls.crt"]
    assert renewed["metadata"]["annotations"]["valve.io/renew-after"] != "1"
    hook = plane.kubectl.get("mutatingwebhookconfiguration", "valve")["webhooks"][0]
    assert hook["clientConfig"]["caBundle"] == renewed["data"]["ca.crt"]


def test_an_upgrade_brings_new_fields_of_the_crds(plane: ControlPlane, tmp_path: Path) -> None:
    """Helm never changes what lies in a chart's crds/ folder; ours are templates."""
    older = tmp_path / "valve"
    shutil.copytree(CHART, older)
    path = older / "files/crds/valve.io_colocationpolicies.yaml"
    crd = yaml.safe_load(path.read_text())
    spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["guardrails"], spec["default"]["guardrails"]
    path.write_text(yaml.safe_dump(crd))
    install(plane, chart=older)
    plane.kubectl("wait", "--for=condition=Established", "crd/colocationpolicies.valve.io", "--timeout=30s")
    policy = {
        "apiVersion": "valve.io/v1alpha1", "kind": "ColocationPolicy", "metadata": {"name": "kept"},
    }  # fmt: skip
    plane.kubectl("delete", "validatingwebhookconfiguration", "valve")  # no operator answers here
    plane.kubectl.apply(policy)
    assert "guardrails" not in plane.kubectl.get("colo", "kept")["spec"]
    upgrade(plane)
    plane.kubectl.until(
        "the new field is defaulted",
        ["colo", "kept"],
        lambda found: "guardrails" in found["spec"],
        timeout_s=20,
    )


def test_an_uninstall_keeps_crds_and_policies_and_a_new_install_finds_them(plane: ControlPlane) -> None:
    install(plane)
    plane.kubectl("wait", "--for=condition=Established", "crd/colocationpolicies.valve.io", "--timeout=30s")
    plane.kubectl("delete", "validatingwebhookconfiguration", "valve")
    policy: dict[str, Any] = {
        "apiVersion": "valve.io/v1alpha1", "kind": "ColocationPolicy", "metadata": {"name": "kept"},
    }  # fmt: skip
    plane.kubectl.apply(policy)
    uid = plane.kubectl.get("colo", "kept")["metadata"]["uid"]
    helm("uninstall", RELEASE, "-n", NAMESPACE, "--wait", kubeconfig=plane.kubeconfig)
    left = plane.kubectl(
        "get", "deploy,cm,secret,sa,svc,ds,clusterrole,clusterrolebinding,role,rolebinding,priorityclass,"
        "mutatingwebhookconfiguration,validatingwebhookconfiguration,validatingadmissionpolicy",
        "-A", "-l", "app.kubernetes.io/part-of=valve", "-o", "name",
    )  # fmt: skip
    assert left == ""
    install(plane)
    assert plane.kubectl.get("colo", "kept")["metadata"]["uid"] == uid


def test_the_nodes_daemonsets_go_with_the_release(plane: ControlPlane) -> None:
    """As the operator makes them: owned by the ConfigMap. Nobody of Valve runs when they are collected."""
    install(plane)
    owner = plane.kubectl.get("configmap", "valve-node", "-n", NAMESPACE)["metadata"]
    for manifest in node_templates(render()).values():
        manifest["metadata"] |= {
            "namespace": NAMESPACE,
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "ConfigMap", "name": owner["name"], "uid": owner["uid"]}
            ],
        }
        plane.kubectl.apply(manifest)
    upgrade(plane, "--set=agent.image.tag=v2")
    assert len(plane.kubectl.items("daemonsets", "-n", NAMESPACE)) == 2
    helm("uninstall", RELEASE, "-n", NAMESPACE, "--wait", kubeconfig=plane.kubeconfig)
    plane.kubectl.until(
        "the DaemonSets are collected", ["daemonsets", "-n", NAMESPACE], lambda found: not found["items"]
    )


def test_admission_policies_compile_without_a_warning(plane: ControlPlane) -> None:
    """The API server type-checks the CEL against the schemas of what it matches."""
    install(plane)
    for name in ("valve-pods", "valve-agent-own-node", "valve-operator-node-labels"):
        found = plane.kubectl.until(
            f"{name} is type-checked",
            ["validatingadmissionpolicy", name],
            lambda entry: (
                entry.get("status", {}).get("observedGeneration") == entry["metadata"]["generation"]
            ),
        )
        assert not found["status"].get("typeChecking", {}).get("expressionWarnings"), json.dumps(
            found["status"]
        )


def test_a_release_of_another_name_is_refused_before_it_does_harm(plane: ControlPlane) -> None:
    install(plane)
    with pytest.raises(HelmFailed, match="cannot be imported into the current release"):
        helm("install", "second", CHART, "-n", "other", "--create-namespace", kubeconfig=plane.kubeconfig)
