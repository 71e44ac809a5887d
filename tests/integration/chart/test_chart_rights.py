# SPDX-License-Identifier: Apache-2.0
"""What each component's token can do and what it is refused, asked of the real API server.

Three views: SubjectAccessReviews for a table of rights; the exact rules that the API server resolves, so that
a right that nobody needs is seen; and real requests, for what the admission policies take away from a role.
An agent's token is bound to a pod on a node, as the kubelet gets it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from helm_chart import NAMESPACE

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.kubectl import Kubectl, Refused

OPERATOR, AGENT, PLUGIN = "valve-operator", "valve-agent", "valve-device-plugin"
NODES = ("alpha", "beta")

RIGHTS = [
    # account, verb, resource, namespace ("" cluster-wide), object, allowed
    (OPERATOR, "watch", "colocationpolicies.valve.io", "", "", True),
    (OPERATOR, "patch", "colocationpolicies.valve.io/status", "", "x", True),
    (OPERATOR, "patch", "colocationpolicies.valve.io", "", "x", False),
    (OPERATOR, "delete", "colocationpolicies.valve.io", "", "x", False),
    (OPERATOR, "create", "colocationnodes.valve.io", "", "", True),
    (OPERATOR, "patch", "colocationnodes.valve.io", "", "x", True),
    (OPERATOR, "patch", "colocationnodes.valve.io/status", "", "x", False),
    (OPERATOR, "list", "nodes", "", "", True),
    (OPERATOR, "patch", "nodes", "", "x", True),
    (OPERATOR, "delete", "nodes", "", "x", False),
    (OPERATOR, "create", "nodes", "", "", False),
    (OPERATOR, "watch", "pods", "", "", True),
    (OPERATOR, "create", "pods/eviction", "default", "", True),
    (OPERATOR, "delete", "pods", "default", "x", False),
    (OPERATOR, "create", "pods", "default", "", False),
    (OPERATOR, "create", "pods/exec", "default", "", False),
    (OPERATOR, "create", "daemonsets.apps", NAMESPACE, "", True),
    (OPERATOR, "create", "daemonsets.apps", "default", "", False),
    (OPERATOR, "create", "deployments.apps", NAMESPACE, "", False),
    (OPERATOR, "get", "configmaps", NAMESPACE, "valve-node", True),
    (OPERATOR, "get", "configmaps", NAMESPACE, "other", False),
    (OPERATOR, "get", "secrets", NAMESPACE, "valve-webhook-tls", False),
    (OPERATOR, "update", "leases.coordination.k8s.io", NAMESPACE, "valve-operator", True),
    (OPERATOR, "update", "leases.coordination.k8s.io", NAMESPACE, "other", False),
    (OPERATOR, "list", "customresourcedefinitions.apiextensions.k8s.io", "", "", False),
    (OPERATOR, "patch", "mutatingwebhookconfigurations.admissionregistration.k8s.io", "", "valve", False),
    (OPERATOR, "create", "serviceaccounts/token", NAMESPACE, "", False),
    (AGENT, "watch", "colocationnodes.valve.io", "", "", True),
    (AGENT, "patch", "colocationnodes.valve.io/status", "", "alpha", True),
    (AGENT, "patch", "colocationnodes.valve.io", "", "alpha", False),
    (AGENT, "create", "colocationnodes.valve.io", "", "", False),
    (AGENT, "list", "pods", "", "", False),
    (AGENT, "list", "nodes", "", "", False),
    (AGENT, "patch", "nodes", "", "alpha", False),
    (AGENT, "get", "secrets", NAMESPACE, "x", False),
    (AGENT, "create", "pods/exec", "default", "", False),
    (AGENT, "list", "colocationpolicies.valve.io", "", "", False),
    (PLUGIN, "list", "pods", "", "", False),
    (PLUGIN, "list", "nodes", "", "", False),
    (PLUGIN, "list", "colocationnodes.valve.io", "", "", False),
    (PLUGIN, "get", "configmaps", NAMESPACE, "valve-node", False),
]  # fmt: skip

RULES = {
    OPERATOR: {
        "colocationpolicies.valve.io": "list watch",
        "colocationpolicies.valve.io/status": "patch",
        "colocationnodes.valve.io": "create delete list patch watch",
        "nodes": "list patch watch",
        "pods": "list watch",
        "pods/eviction": "create",
        "events": "create",
        "daemonsets.apps": "create delete list patch",
        "configmaps [valve-node]": "get",
        "leases.coordination.k8s.io": "create",
        "leases.coordination.k8s.io [valve-operator]": "get update",
    },
    AGENT: {
        "colocationnodes.valve.io": "list watch",
        "colocationnodes.valve.io/status": "patch",
        "events": "create",
    },
    PLUGIN: {},
}
"""Everything a component may do beyond what every account may (discovery and self reviews)."""


def review_of(account: str, verb: str, resource: str, namespace: str, name: str) -> dict[str, Any]:
    base, _, sub = resource.partition("/")
    plural, _, group = base.partition(".")
    return {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{NAMESPACE}:{account}",
            "groups": ["system:serviceaccounts", "system:authenticated"],
            "resourceAttributes": {
                "verb": verb, "group": group, "resource": plural, "subresource": sub,
                "namespace": namespace, "name": name,
            },
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def answers(installed: ControlPlane) -> list[bool]:
    """What the API server answers to each of RIGHTS, in one call: a kubectl for each would take a minute."""
    text = "\n---\n".join(json.dumps(review_of(*right[:5])) for right in RIGHTS)
    output = installed.kubectl("create", "--validate=false", "-f", "-", "-o", "json", stdin=text).strip()
    found, decoder = [], json.JSONDecoder()
    while output:
        answer, end = decoder.raw_decode(output)
        found += [entry["status"]["allowed"] for entry in answer.get("items", [answer])]
        output = output[end:].lstrip()
    assert len(found) == len(RIGHTS)
    return found


@pytest.mark.parametrize(
    "number", range(len(RIGHTS)), ids=[" ".join(map(str, right[:5])) for right in RIGHTS]
)
def test_a_right_is_there_or_not(answers: list[bool], number: int) -> None:
    assert answers[number] == RIGHTS[number][5]


@pytest.mark.parametrize("account", RULES)
def test_it_has_these_rights_and_no_other(installed: ControlPlane, account: str) -> None:
    review = {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": NAMESPACE},
    }  # fmt: skip
    kubectl = installed.service_account(NAMESPACE, account)
    answer = kubectl("create", "--validate=false", "-f", "-", "-o", "json", stdin=json.dumps(review))
    status = json.loads(answer)["status"]
    found: dict[str, set[str]] = {}
    for rule in status["resourceRules"]:
        for group in rule["apiGroups"]:
            if group in ("authorization.k8s.io", "authentication.k8s.io"):
                continue  # every account may ask what it may do
            for resource in rule["resources"]:
                base, slash, sub = resource.partition("/")
                name = base + (f".{group}" if group else "") + slash + sub
                for limit in rule.get("resourceNames") or [""]:
                    key = f"{name} [{limit}]" if limit else name
                    found.setdefault(key, set()).update(rule["verbs"])
    assert {key: " ".join(sorted(verbs)) for key, verbs in found.items()} == RULES[account]


@pytest.fixture(scope="module")
def nodes(installed: ControlPlane) -> Iterator[None]:
    """Two nodes with the agent's pod on each, and their ColocationNodes."""
    kubectl = installed.kubectl
    for node in NODES:
        made = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": {"site": "here"}}}
        kubectl("create", "-f", "-", stdin=json.dumps(made))  # `apply` would make kubectl the labels' manager
        kubectl.apply(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"agent-{node}", "namespace": NAMESPACE},
             "spec": {"nodeName": node, "serviceAccountName": AGENT, "terminationGracePeriodSeconds": 0,
                      "containers": [{"name": "agent", "image": "none"}]}},
            {"apiVersion": "valve.io/v1alpha1", "kind": "ColocationNode", "metadata": {"name": node},
             "spec": {"policy": {"name": "x"}}},
        )  # fmt: skip
    yield
    kubectl("delete", "colocationnodes", *NODES)
    kubectl("delete", "pods", "-n", NAMESPACE, *(f"agent-{node}" for node in NODES), "--force")
    kubectl("delete", "nodes", *NODES)


def agent_of(plane: ControlPlane, node: str) -> Kubectl:
    """What the kubelet of a node mounts into the agent's pod there."""
    token = plane.kubectl(
        "create",
        "token",
        AGENT,
        "-n",
        NAMESPACE,
        "--bound-object-kind=Pod",
        f"--bound-object-name=agent-{node}",
    ).strip()
    path = plane.state / f"agent-{node}.kubeconfig"
    return Kubectl(plane.authority.kubeconfig(path, plane.server, {"token": token}))


def apply_as(kubectl: Kubectl, manager: str, manifest: dict[str, Any], *flags: str) -> str:
    """Server-side apply is one PATCH, as the programs send it: no right to read is needed."""
    return kubectl(
        "apply", "--server-side", "--validate=false", f"--field-manager={manager}", *flags, "-f", "-",
        stdin=json.dumps(manifest),
    )  # fmt: skip


def write_status(kubectl: Kubectl, node: str) -> str:
    manifest = {
        "apiVersion": "valve.io/v1alpha1", "kind": "ColocationNode", "metadata": {"name": node},
        "status": {"agentVersion": "1"},
    }  # fmt: skip
    return apply_as(kubectl, "valve-agent", manifest, "--subresource=status")


@pytest.mark.usefixtures("nodes")
def test_an_agent_writes_its_own_node_and_no_other(installed: ControlPlane) -> None:
    agent = agent_of(installed, "alpha")
    write_status(agent, "alpha")
    assert installed.kubectl.get("colonode", "alpha")["status"]["agentVersion"] == "1"
    with pytest.raises(Refused) as refused:
        write_status(agent, "beta")
    assert "may write only the ColocationNode alpha, not beta" in refused.value.sentence
    assert "status" not in installed.kubectl.get("colonode", "beta")


def event_of(host: str, component: str = "valve-agent") -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": f"x.{host}", "namespace": "default"},
        "involvedObject": {"kind": "Pod", "namespace": "default", "name": "x"}, "reason": "ValveKilled",
        "message": "why", "type": "Warning", "reportingComponent": component, "reportingInstance": host,
    }  # fmt: skip


@pytest.mark.usefixtures("nodes")
def test_an_agent_posts_events_in_its_own_name_only(installed: ControlPlane) -> None:
    agent = agent_of(installed, "alpha")
    agent("create", "-f", "-", stdin=json.dumps(event_of("alpha")))
    for event in (event_of("beta"), event_of("alpha", "kubelet")):
        with pytest.raises(Refused) as refused:
            agent("create", "-f", "-", stdin=json.dumps(event))
        assert "in its own name only" in refused.value.sentence
    with pytest.raises(Refused):
        agent("delete", "event", "x.alpha")
    installed.kubectl("create", "-f", "-", stdin=json.dumps(event_of("beta", "kubelet")))


@pytest.mark.usefixtures("nodes")
def test_an_agents_token_without_a_node_writes_nothing(installed: ControlPlane) -> None:
    with pytest.raises(Refused) as refused:
        write_status(installed.service_account(NAMESPACE, AGENT), "alpha")
    assert "bound to no node" in refused.value.sentence


def label_node(kubectl: Kubectl, node: str, labels: dict[str, str]) -> str:
    manifest = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": labels}}
    return apply_as(kubectl, "valve-operator", manifest)


@pytest.mark.usefixtures("nodes")
def test_the_operator_labels_nodes_with_its_own_labels_only(installed: ControlPlane) -> None:
    operator = installed.service_account(NAMESPACE, OPERATOR)
    label_node(operator, "alpha", {"valve.io/managed": "true"})
    assert installed.kubectl.get("node", "alpha")["metadata"]["labels"]["valve.io/managed"] == "true"
    label_node(operator, "alpha", {})
    assert installed.kubectl.get("node", "alpha")["metadata"]["labels"] == {"site": "here"}
    for manifest, sentence in (
        ({"metadata": {"labels": {"site": "there"}}}, "only node labels that begin with valve.io/, not site"),
        ({"metadata": {"labels": {"zone": "a"}}}, "only node labels that begin with valve.io/, not zone"),
        ({"metadata": {"annotations": {"a": "b"}}}, "nothing of a node but labels"),
        ({"spec": {"unschedulable": True}}, "nothing of a node but labels"),
        ({"spec": {"taints": [{"key": "a", "effect": "NoExecute"}]}}, "nothing of a node but labels"),
    ):
        whole = {"apiVersion": "v1", "kind": "Node", **manifest}
        whole["metadata"] = {"name": "alpha", **manifest.get("metadata", {})}
        with pytest.raises(Refused) as refused:
            apply_as(operator, "valve-operator", whole, "--force-conflicts")
        assert sentence in refused.value.sentence, manifest
    with pytest.raises(Refused):
        label_node(operator, "gamma", {"valve.io/managed": "true"})
    assert installed.kubectl("get", "nodes", "-o", "name").split() == [f"node/{node}" for node in NODES]


@pytest.mark.usefixtures("nodes")
def test_an_administrator_is_not_bound_by_the_components_policies(installed: ControlPlane) -> None:
    installed.kubectl("label", "node", "beta", "zone=a")
    write_status(installed.kubectl, "beta")
    assert installed.kubectl.get("colonode", "beta")["status"]["agentVersion"] == "1"
