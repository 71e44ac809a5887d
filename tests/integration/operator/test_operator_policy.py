# SPDX-License-Identifier: Apache-2.0
"""A policy on a real API server: nodes, DaemonSets, status; what goes when something goes."""

from __future__ import annotations

from operator_rig import ACCOUNT, NAMESPACE, OWNER, Installed, eventually, names

from e2e.cluster.kubectl import Refused

DAEMONSETS = {"valve-agent", "valve-device-plugin"}


def test_a_policy_becomes_settings_labels_daemonsets_and_a_status(installed: Installed) -> None:
    kubectl = installed.kubectl
    installed.node("gpu-1", gpu="yes")
    installed.node("gpu-2", gpu="yes")
    installed.node("other")
    with installed.replica("a") as operator:
        installed.policy("fleet", nodeSelector={"gpu": "yes"}, compute={"lease": "1s"})
        eventually("settings", lambda: names(kubectl, "colonode") == {"gpu-1", "gpu-2"})
        eventually(
            "labels", lambda: names(kubectl, "node", "-l", "valve.io/managed=true") == {"gpu-1", "gpu-2"}
        )
        eventually("DaemonSets", lambda: names(kubectl, "daemonset", "-n", NAMESPACE) == DAEMONSETS)
        node = kubectl.get("colonode", "gpu-1")
        assert node["spec"]["compute"]["lease"] == "1s"
        assert node["spec"]["policy"] == {"name": "fleet", "generation": 1}
        for name in ("gpu-1", "gpu-2"):
            installed.report(name, preemptions=3, reclaims=1)
        eventually("Ready", lambda: installed.condition("fleet", "Ready").get("status") == "True")
        *shown, _age = kubectl("get", "colo").split()
        assert shown == [
            *("NAME", "READY", "NODES", "CURRENT", "GPUS", "P99", "US", "PREEMPTIONS", "RECLAIMS", "AGE"),
            *("fleet", "True", "2", "2", "2", "400", "6", "2"),
        ]
        mine = f"involvedObject.uid={kubectl.get('colo', 'fleet')['metadata']['uid']}"  # others had that name
        events = kubectl.get("events", "-n", "default", f"--field-selector={mine}")["items"]
        assert sorted(event["reason"] for event in events) == ["NotReady", "Ready"]

        quiet = operator.metrics()['valve_operator_actions_total{outcome="done"}']
        eventually("three more runs", lambda: operator.metrics()["valve_operator_reconciles_total"] > 3)
        assert operator.metrics()['valve_operator_actions_total{outcome="done"}'] == quiet, (
            "nothing is missing"
        )
        assert operator.metrics()['valve_operator_actions_total{outcome="failed"}'] == 0

        kubectl("delete", "colo", "fleet", "--timeout=10s")
        eventually("no settings", lambda: not names(kubectl, "colonode"))
        eventually("no DaemonSets", lambda: not names(kubectl, "daemonset", "-n", NAMESPACE))
        eventually("no labels", lambda: not names(kubectl, "node", "-l", "valve.io/managed"))


def test_without_an_operator_nothing_is_blocked(installed: Installed) -> None:
    """An uninstall deletes the operator first and the templates' ConfigMap with it: the rest goes "
    "by itself."""
    kubectl = installed.kubectl
    installed.node("gpu-1")
    with installed.replica("a"):
        installed.policy("fleet")
        eventually("settings", lambda: names(kubectl, "colonode") == {"gpu-1"})
        eventually("DaemonSets", lambda: names(kubectl, "daemonset", "-n", NAMESPACE) == DAEMONSETS)
    owner = kubectl.get("configmap", OWNER, "-n", NAMESPACE)
    kubectl("delete", "configmap", OWNER, "-n", NAMESPACE)
    try:
        eventually("the garbage collector", lambda: not names(kubectl, "daemonset", "-n", NAMESPACE))
        kubectl("delete", "node", "gpu-1")
        eventually("settings of a node that is gone", lambda: not names(kubectl, "colonode"))
        kubectl("delete", "colo", "fleet", "--timeout=10s")
    finally:
        meta = {name: owner["metadata"][name] for name in ("name", "namespace", "labels")}
        kubectl.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": owner["data"]})


def test_hands_that_change_what_the_operator_wrote_are_undone(installed: Installed) -> None:
    kubectl = installed.kubectl
    installed.node("gpu-1")
    with installed.replica("a"):
        installed.policy("fleet")
        eventually("settings", lambda: names(kubectl, "colonode") == {"gpu-1"})
        patch = '{"spec": {"compute": {"lease": "20ms"}}}'
        kubectl("patch", "colonode", "gpu-1", "--type=merge", "-p", patch)
        kubectl("label", "node", "gpu-1", "valve.io/managed-")
        eventually(
            "settings again", lambda: kubectl.get("colonode", "gpu-1")["spec"]["compute"]["lease"] == "500ms"
        )
        eventually("label again", lambda: names(kubectl, "node", "-l", "valve.io/managed=true"))


def test_overlap_is_resolved_by_priority_and_told(installed: Installed) -> None:
    kubectl = installed.kubectl
    installed.node("gpu-1")
    with installed.replica("a"):
        installed.policy("fleet")
        eventually("the first", lambda: names(kubectl, "colonode") == {"gpu-1"})
        installed.policy("canary", priority=10)
        eventually(
            "the canary", lambda: kubectl.get("colonode", "gpu-1")["spec"]["policy"]["name"] == "canary"
        )
        eventually("overlap", lambda: installed.condition("fleet", "Overlapping")["status"] == "True")
        lost = installed.condition("fleet", "Overlapping")["message"]
        assert "canary on 1" in lost


def test_the_token_can_what_it_needs_and_nothing_more(installed: Installed) -> None:
    """The operator ran with these rights above; here is what they are not."""
    denied = [
        ("delete", "pods"),
        ("create", "pods"),
        ("patch", "pods"),
        ("delete", "nodes"),
        ("create", "nodes"),
        ("get", "secrets"),
        ("patch", "colocationpolicies"),
        ("patch", "colocationnodes", "--subresource=status"),
        ("create", "clusterrolebindings"),
        ("list", "configmaps"),
        ("create", "daemonsets", "-n", "default"),
    ]
    user = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
    for words in denied:
        assert not can(installed, user, *words), f"the operator can {' '.join(words)}"


def can(installed: Installed, user: str, verb: str, resource: str, *where: str) -> bool:
    try:
        installed.kubectl("auth", "can-i", verb, resource, *where, f"--as={user}")
    except Refused:
        return False
    return True
