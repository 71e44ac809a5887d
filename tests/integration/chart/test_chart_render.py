# SPDX-License-Identifier: Apache-2.0
"""What the chart renders: it lints, refuses wrong values with a sentence, gives no pod more than it needs.

Needs helm, not a cluster. Gaps: whether the API server takes the objects is test_chart_schemas.py and
test_chart_install.py.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_chart import (
    CHART,
    CI_VALUES,
    NAMESPACE,
    RELEASE,
    ROOT,
    HelmFailed,
    containers,
    find,
    helm,
    node_templates,
    render,
    workloads,
)

CI = pytest.mark.parametrize("values", CI_VALUES, ids=[path.stem for path in CI_VALUES])
HARDENED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@CI
def test_it_lints_strictly(values: Path) -> None:
    report = helm("lint", "--strict", CHART, f"--values={values}")
    assert "[INFO]" not in report, report


def test_there_are_several_sets_of_values() -> None:
    assert len(CI_VALUES) >= 4


@pytest.mark.parametrize(
    ("description", "value", "sentence"),
    [
        ("a misspelt name", 'operator.replica="2"', "additional properties 'replica' not allowed"),
        ("a misspelt name at the top", "agents={}", "additional properties 'agents' not allowed"),
        ("no operator", "operator.replicas=0", "minimum: got 0, want 1"),
        ("a port that is none", "webhook.port=70000", "maximum: got 70,000, want 65,535"),
        ("a relative path", 'node.libraryDir="opt/valve"', "does not match pattern"),
        ("a path with a slash at the end", 'node.runDir="/run/valve/"', "does not match pattern"),
        ("a device that Valve has not", 'agent.device="tpu"', "value must be one of '', 'cpu', 'nvidia'"),
        ("a registry with a slash", 'image.registry="example.com/"', "does not match pattern"),
        ("a digest that is none", 'agent.image.digest="latest"', "does not match pattern"),
        ("an unknown source of certificates", 'webhook.certificate.source="acme"', "value must be one of"),
        ("a CA that is no PEM", 'webhook.certificate.caBundle="x"', "does not match pattern"),
        ("a label that is none", 'commonLabels={"a":"b c"}', "does not match pattern"),
        (
            "an account that is not named",
            "operator.serviceAccount.create=false",
            "operator.serviceAccount.create is false: name the account",
        ),
        (
            "a secret that is not named",
            'webhook.certificate={"source":"secret","caBundle":"-----BEGIN CERTIFICATE-----"}',
            "name a kubernetes.io/tls secret in webhook.certificate.existingSecret",
        ),
        (
            "a secret whose CA is not given",
            'webhook.certificate={"source":"secret","existingSecret":"tls"}',
            "put the CA that signed it into webhook.certificate.caBundle (PEM)",
        ),
        (
            "a monitor where nothing reads it",
            "monitoring.podMonitor.enabled=true",
            "the cluster does not serve monitoring.coreos.com/v1: install the Prometheus operator first",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_a_sentence(description: str, value: str, sentence: str) -> None:
    with pytest.raises(HelmFailed) as refused:
        render(value)
    assert sentence in str(refused.value), description


def test_an_old_cluster_is_refused() -> None:
    with pytest.raises(HelmFailed, match=r"requires kubeVersion: >=1\.32"):
        helm("template", RELEASE, CHART, "--kube-version=1.31.9")


def test_monitors_need_no_switch_where_the_api_is() -> None:
    objects = yaml.safe_load_all(
        helm(
            "template", RELEASE, CHART, "--api-versions=monitoring.coreos.com/v1",
            "--set=monitoring.podMonitor.enabled=true",
        )
    )  # fmt: skip
    monitors = [entry for entry in objects if entry and entry["kind"] == "PodMonitor"]
    assert [entry["metadata"]["name"] for entry in monitors] == ["valve-agent", "valve-device-plugin"]


@CI
def test_one_container_is_privileged_and_every_other_is_hardened(values: Path) -> None:
    privileged = []
    for pod, spec in workloads(render(files=[values])):
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        assert not spec.get("hostNetwork"), pod
        assert not spec.get("hostIPC"), pod
        for container in containers(spec):
            security = container["securityContext"]
            if security.get("privileged"):
                privileged.append((pod.split("-")[-1], container["name"]))
                assert security["readOnlyRootFilesystem"]
            else:
                assert HARDENED.items() <= security.items(), (pod, container["name"])
    assert privileged == [("agent", "agent")]


@CI
def test_only_the_agent_sees_the_hosts_processes(values: Path) -> None:
    seeing = [pod.split("-")[-1] for pod, spec in workloads(render(files=[values])) if spec.get("hostPID")]
    assert seeing == ["agent"]


@CI
def test_only_node_programs_are_root_and_mount_the_host(values: Path) -> None:
    for pod, spec in workloads(render(files=[values])):
        on_node = pod.endswith(("-agent", "-device-plugin"))
        host = [volume for volume in spec["volumes"] if "hostPath" in volume]
        assert bool(host) == on_node, pod
        if not on_node:
            assert spec["securityContext"]["runAsNonRoot"], pod
            assert spec["securityContext"]["runAsUser"] > 10_000, pod


@CI
def test_every_container_says_what_it_needs(values: Path) -> None:
    for pod, spec in workloads(render(files=[values])):
        for container in containers(spec):
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), pod
            assert "memory" in resources["limits"], pod
            assert "cpu" not in resources["limits"], (
                f"{pod}: a throttled container holds up what waits for it"
            )
            assert not container["image"].endswith(":latest"), pod


def test_the_device_plugin_has_no_token_and_no_right() -> None:
    objects = render()
    spec = node_templates(objects)["device-plugin.yaml"]["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    bound = [
        subject["name"]
        for entry in objects
        if entry["kind"].endswith("RoleBinding")
        for subject in entry["subjects"]
    ]
    assert spec["serviceAccountName"] not in bound
    assert spec["serviceAccountName"] != "default"


@pytest.mark.parametrize("writer", ["agent.yaml", "device-plugin.yaml"])
def test_node_programs_write_only_where_they_must(writer: str) -> None:
    """A hostPath is mounted read-only where the program only reads."""
    writes = {
        "agent.yaml": {"/run/valve"},
        "device-plugin.yaml": {"/var/lib/kubelet/device-plugins", "/var/lib/valve", "/opt/valve"},
    }[writer]
    spec = node_templates(render())[writer]["spec"]["template"]["spec"]
    host = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    found = {
        host[mount["name"]]
        for container in containers(spec)
        for mount in container["volumeMounts"]
        if mount["name"] in host and not mount.get("readOnly")
    }
    assert found == writes


def test_mount_paths_are_the_hosts_own() -> None:
    """The kubelet mounts by host paths that the device plugin names: they must be the same inside."""
    for template in node_templates(render('node.libraryDir="/srv/valve"', 'node.runDir="/srv/run"')).values():
        spec = template["spec"]["template"]["spec"]
        host = {v["name"]: v["hostPath"]["path"] for v in spec["volumes"] if "hostPath" in v}
        for container in containers(spec):
            for mount in container["volumeMounts"]:
                assert host.get(mount["name"], mount["mountPath"]) == mount["mountPath"]


def test_a_template_value_is_merged_into_the_daemonset() -> None:
    plain = node_templates(render())["agent.yaml"]
    ours = node_templates(render('agent.template={"spec":{"nodeSelector":{"gpu":"yes"},"dnsPolicy":"None"}}'))
    spec = ours["agent.yaml"]["spec"]["template"]["spec"]
    assert spec.pop("nodeSelector") == {"gpu": "yes"}
    assert spec.pop("dnsPolicy") == "None"
    assert ours["agent.yaml"] == plain


@pytest.mark.parametrize(
    ("device", "asks"), [("nvidia", True), ("", True), ("cpu", False)], ids=["nvidia", "by policy", "cpu"]
)
def test_the_agent_asks_nvidias_container_runtime_for_every_gpu(device: str, asks: bool) -> None:
    """Without it a runtime class gives the container no GPU and no library."""
    (agent,) = containers(
        node_templates(render(f'agent.device="{device}"'))["agent.yaml"]["spec"]["template"]["spec"]
    )
    env = {entry["name"]: entry.get("value") for entry in agent["env"]}
    assert (env.get("NVIDIA_VISIBLE_DEVICES") == "all") == asks
    assert (env.get("NVIDIA_DRIVER_CAPABILITIES") == "compute,utility") == asks


def test_selectors_select_what_the_templates_label() -> None:
    objects = render("monitoring.assumeApi=true", "monitoring.podMonitor.enabled=true")
    labels = {
        pod["metadata"]["name"]: pod["spec"]["template"]["metadata"]["labels"]
        for pod in [find(objects, "Deployment"), *node_templates(objects).values()]
    }
    for kind, path in (
        ("Service", ""),
        ("PodMonitor", "matchLabels"),
        ("PodDisruptionBudget", "matchLabels"),
    ):
        for entry in (entry for entry in objects if entry["kind"] == kind):
            selector = entry["spec"]["selector"]
            selector = selector[path] if path else selector
            name = entry["metadata"]["name"].replace("webhook", "operator")
            assert selector.items() <= labels[name].items(), (kind, name)
            others = [other for other in labels if other != name]
            assert not any(selector.items() <= labels[other].items() for other in others), (kind, name)


def test_a_new_chart_version_alone_restarts_nothing(tmp_path: Path) -> None:
    """Only the chart's version differs: pods keep their templates."""
    copy = tmp_path / "valve"
    shutil.copytree(CHART, copy)
    text = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(text.replace("\nversion: 0.1.0", "\nversion: 0.1.1"))
    newer = [
        document
        for document in yaml.safe_load_all(helm("template", RELEASE, copy, f"-n={NAMESPACE}"))
        if document
    ]
    assert find(newer, "Deployment")["metadata"]["labels"]["helm.sh/chart"] == "valve-0.1.1"
    older = render()
    assert node_templates(newer) == node_templates(older)
    assert find(newer, "Deployment")["spec"]["template"] == find(older, "Deployment")["spec"]["template"]


def test_new_node_templates_start_a_new_operator() -> None:
    def checksum(*values: str) -> str:
        meta = find(render(*values), "Deployment")["spec"]["template"]["metadata"]
        return str(meta["annotations"]["checksum/node-templates"])

    assert checksum() == checksum()
    assert checksum() != checksum('agent.extraArgs=["--x"]')


@pytest.mark.parametrize("plural", ["colocationpolicies", "colocationnodes"])
@pytest.mark.parametrize("keep", [True, False])
def test_the_crds_are_the_generated_ones(plural: str, keep: bool) -> None:
    wanted = yaml.safe_load((ROOT / f"crds/valve.io_{plural}.yaml").read_text())
    crd = find(render(f"crds.keep={str(keep).lower()}"), "CustomResourceDefinition", f"{plural}.valve.io")
    annotations = crd["metadata"].get("annotations", {})
    assert (annotations.get("helm.sh/resource-policy") == "keep") == keep
    assert crd["spec"] == wanted["spec"]


def test_the_runtime_is_looked_for_where_it_is_installed() -> None:
    """The folder's name is the version of the library that runtime/build.py makes."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project
    spec = node_templates(render())["device-plugin.yaml"]["spec"]["template"]["spec"]
    assert f"--library=/opt/valve/{chart['appVersion']}" in spec["containers"][0]["args"]


def decoded(value: str) -> str:
    return base64.b64decode(value).decode()


def test_the_chart_makes_a_certificate_that_the_api_server_can_verify(tmp_path: Path) -> None:
    objects = render()
    secret = find(objects, "Secret")
    bundles = {
        entry["webhooks"][0]["clientConfig"]["caBundle"]
        for entry in objects
        if entry["kind"].endswith("WebhookConfiguration")
    }
    assert bundles == {secret["data"]["ca.crt"]}, "one certificate per rendering"
    (tmp_path / "ca.crt").write_text(decoded(secret["data"]["ca.crt"]))
    (tmp_path / "tls.crt").write_text(decoded(secret["data"]["tls.crt"]))
    service: dict[str, Any] = find(objects, "Service", "valve-webhook")["metadata"]
    name = f"{service['name']}.{service['namespace']}.svc"
    for host, code in ((name, 0), ("example.com", 2)):
        verified = subprocess.run(
            ["openssl", "verify", "-CAfile", "ca.crt", "-verify_hostname", host, "tls.crt"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert verified.returncode == code, verified.stderr


def test_notes_say_what_to_do_next() -> None:
    text = helm("install", RELEASE, CHART, f"-n={NAMESPACE}", "--dry-run=client")
    notes = text.split("NOTES:")[1]
    for words in (
        "rollout status deployment/valve-operator",
        "kubectl get colo",
        "helm test valve",
        "image.registry",
    ):
        assert words in notes
