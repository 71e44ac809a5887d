# SPDX-License-Identifier: Apache-2.0
"""`valve drain-offline NODE`: evict the offline pods of a node, and nothing else.

Why it exists: a node is to give online all it has, or to be looked after, without touching its online pods.

By the Eviction API: disruption budgets are honoured; an eviction that a budget forbids is tried again until
the time is over. Pods of DaemonSets are left (they would come back to the same node), so are static pods.

Threading model: one thread. Called by valve_cli.main and kubectl.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from valve_agent.kube.api import Api, ApiRefused, KubeError, NotFound, TooManyRequests
from valve_cli import cluster

TIMEOUT_S = 300.0
RETRY_S = 2.0
_OUTCOME_STYLES = {"gone": "green", "would go": "green", "left": "yellow", "blocked": "red", "refused": "red"}


@dataclass(slots=True)
class Outcome:
    pod: str
    uid: str
    outcome: str
    """gone, would go, left, blocked (a budget), refused, ending"""
    why: str = ""


def main(argv: list[str], prog: str = "valve drain-offline") -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description="Evict the offline pods of a node; disruption budgets are honoured."
    )
    parser.add_argument("node", metavar="NODE")
    parser.add_argument("--dry-run", action="store_true", help="ask the API server what would happen")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S", help="give up after so long (default: 300)"
    )
    parser.add_argument("--grace-period", type=int, metavar="S", help="default: each pod's own")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text", help="default: text")
    cluster.add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        api = cluster.connect(arguments, os.environ)
        api.get(f"/api/v1/nodes/{arguments.node}")
        drain = Drain(api, arguments.grace_period, arguments.dry_run)
        outcomes = drain.run(arguments.node, arguments.timeout)
    except NotFound:
        print(f"{prog}: there is no node {arguments.node}: kubectl get nodes", file=sys.stderr)
        return 1
    except KubeError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    if arguments.output == "json":
        document = {"schema": "valve.io/drain/v1", "node": arguments.node, "dry_run": arguments.dry_run}
        print(json.dumps({**document, "pods": [asdict(one) for one in outcomes]}, indent=2))
    else:
        _show(Console(), arguments.node, outcomes)
    return 0 if all(one.outcome in ("gone", "would go", "left") for one in outcomes) else 1


class Drain:
    def __init__(
        self, api: Api, grace_s: int | None, dry_run: bool, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._api = api
        self._grace_s = grace_s
        self._dry_run = dry_run
        self._sleep = sleep

    def run(self, node: str, timeout_s: float) -> list[Outcome]:
        """Evict and wait until they are gone, for `timeout_s` at most. Raises KubeError."""
        pods = [pod for pod in self._pods(node) if cluster.workload_of(pod) == "offline" and not _over(pod)]
        outcomes = [self._first(pod) for pod in pods]
        if self._dry_run:
            return outcomes
        deadline = time.monotonic() + timeout_s
        while open_ones := [one for one in outcomes if one.outcome in ("ending", "blocked")]:
            if time.monotonic() > deadline:
                break
            self._sleep(RETRY_S)
            there = {pod["metadata"]["uid"]: pod for pod in self._pods(node)}
            for one in open_ones:
                pod = there.get(one.uid)
                if pod is None or _over(pod):
                    one.outcome, one.why = "gone", ""
                elif one.outcome == "blocked":
                    one.outcome, one.why = self._evict(pod)
        for one in outcomes:
            if one.outcome == "ending":
                one.why = f"evicted, but still there after {timeout_s:.0f} s"
        return outcomes

    def _pods(self, node: str) -> list[dict[str, Any]]:
        return cluster.items(self._api, "/api/v1/pods", {"fieldSelector": f"spec.nodeName={node}"})

    def _first(self, pod: Mapping[str, Any]) -> Outcome:
        name, uid = cluster.name_of(pod), pod["metadata"]["uid"]
        owners = [owner["kind"] for owner in pod["metadata"].get("ownerReferences") or []]
        if "DaemonSet" in owners:
            return Outcome(name, uid, "left", "its DaemonSet would start it here again")
        if "Node" in owners:
            return Outcome(name, uid, "left", "a static pod: the kubelet would start it again")
        if pod["metadata"].get("deletionTimestamp"):
            return Outcome(name, uid, "ending", "it is ending already")
        outcome, why = self._evict(pod)
        return Outcome(name, uid, outcome, why)

    def _evict(self, pod: Mapping[str, Any]) -> tuple[str, str]:
        metadata = pod["metadata"]
        options: dict[str, Any] = {"preconditions": {"uid": metadata["uid"]}}
        if self._grace_s is not None:
            options["gracePeriodSeconds"] = self._grace_s
        if self._dry_run:
            options["dryRun"] = ["All"]
        body = {
            "apiVersion": "policy/v1", "kind": "Eviction", "deleteOptions": options,
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
        }  # fmt: skip
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/eviction"
        try:
            self._api.post(path, body)
        except TooManyRequests as error:
            return "blocked", str(error)
        except NotFound:
            return "gone", ""
        except ApiRefused as error:
            return "refused", str(error)
        return ("would go", "") if self._dry_run else ("ending", "")


def _over(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _show(console: Console, node: str, outcomes: list[Outcome]) -> None:
    if not outcomes:
        console.print(f"{node} has no offline pods.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("POD", "OUTCOME", "WHY"):
        table.add_column(name)
    for one in outcomes:
        style = _OUTCOME_STYLES.get(one.outcome, "yellow")
        table.add_row(one.pod, f"[{style}]{one.outcome}[/]", one.why)
    console.print(table)
    if any(one.outcome == "gone" for one in outcomes):
        console.print(
            "New offline pods may come here again; to keep them away, take the node out of the policy's "
            "nodeSelector."
        )
