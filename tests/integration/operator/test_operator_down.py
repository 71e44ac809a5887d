# SPDX-License-Identifier: Apache-2.0
"""While no operator answers: annotated pods are refused, all others are untouched."""

from __future__ import annotations

import pytest
from operator_rig import Installed, as_kubernetes_wants, create

from e2e.cluster.kubectl import Refused
from valve_operator.cases import OFFLINE, ONLINE, Case


@pytest.mark.parametrize("annotations", [ONLINE, OFFLINE], ids=["online", "offline"])
def test_an_annotated_pod_is_refused_and_the_sentence_says_by_whom(
    installed: Installed, annotations: dict[str, str]
) -> None:
    with pytest.raises(Refused, match=r"mutate-pods\.valve\.io"):
        create(installed, as_kubernetes_wants(Case("", annotations, {})))


def test_a_pod_that_asks_for_the_resource_without_an_annotation_is_refused(installed: Installed) -> None:
    limits = {"limits": {"valve.io/online-gpu": "1"}}
    with pytest.raises(Refused, match=r"valve\.io"):
        create(installed, as_kubernetes_wants(Case("", {}, {}, {"engine": {"resources": limits}})))


def test_a_pod_without_annotations_is_created(installed: Installed) -> None:
    assert create(installed, as_kubernetes_wants(Case("", {}, {})))["spec"]["containers"]


def test_a_pod_that_went_by_the_webhook_has_no_way_in_either(installed: Installed) -> None:
    """Somebody deleted the webhook: the admission policy has the last word."""
    kubectl = installed.kubectl
    webhook = kubectl.get("mutatingwebhookconfiguration", "valve")
    kubectl("delete", "mutatingwebhookconfiguration", "valve")
    try:
        with pytest.raises(Refused, match=r"ValidatingAdmissionPolicy 'valve-pods'"):
            create(installed, as_kubernetes_wants(Case("", OFFLINE, {})))
    finally:
        meta = {name: webhook["metadata"][name] for name in ("name", "labels")}
        kubectl.apply({**webhook, "metadata": meta})
