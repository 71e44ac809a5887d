# SPDX-License-Identifier: Apache-2.0
"""`helm test`: asks the cluster whether Valve's parts that need no node are in place.

Why it exists: an installation can look healthy while admission does nothing. It lists what must be served,
and sends pods with dryRun=All, so that the API server goes through the webhook and the policies and stores
nothing. Standard library only; runs in the operator's image as the chart's test pod, with the rights of
templates/tests.

Threading model: one thread. Exit status: 0 all passed, 1 something did not; every check prints one line.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
GROUP = "/apis/valve.io/v1alpha1"
REQUEST_S = 15.0

Api = Callable[[str, str, "dict[str, Any] | None"], "tuple[int, dict[str, Any]]"]
"""(method, path, body) -> (HTTP status, answer)."""


class Failed(Exception):
    """A check did not pass; the message says what to do."""


def connect(environ: dict[str, str], account: Path = ACCOUNT) -> Api:
    """The API server as this pod reaches it. Raises OSError where the pod has no token."""
    host, port = environ["KUBERNETES_SERVICE_HOST"], environ["KUBERNETES_SERVICE_PORT"]
    base = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    context = ssl.create_default_context(cafile=str(account / "ca.crt"))
    token = (account / "token").read_text().strip()

    def call(method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            base + path, method=method, data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_S, context=context) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    return call


def pod(image: str, annotations: dict[str, str]) -> dict[str, Any]:
    security = {
        "allowPrivilegeEscalation": False, "runAsNonRoot": True, "runAsUser": 65532,
        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    container = {"name": "main", "image": image, "securityContext": security}
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"generateName": "valve-selftest-", "annotations": annotations},
        "spec": {"restartPolicy": "Never", "containers": [container]},
    }  # fmt: skip


def limits_of(answer: dict[str, Any]) -> dict[str, str]:
    return dict(answer["spec"]["containers"][0].get("resources", {}).get("limits", {}))


class SelfTest:
    def __init__(self, api: Api, namespace: str, image: str) -> None:
        self._api, self._namespace, self._image = api, namespace, image

    def served(self, plural: str) -> list[dict[str, Any]]:
        """Objects of a kind of Valve. Raises Failed where the API server does not serve it."""
        status, answer = self._api("GET", f"{GROUP}/{plural}", None)
        if status == 404:
            raise Failed(f"{plural} are not served: install with crds.install=true or apply crds/*.yaml")
        if status != 200:
            raise Failed(f"listing {plural} gave {status}: {answer.get('message')}")
        return list(answer["items"])

    def crds(self) -> str:
        policies, nodes = self.served("colocationpolicies"), self.served("colocationnodes")
        return f"{len(policies)} policies, {len(nodes)} nodes"

    def create(self, annotations: dict[str, str]) -> tuple[int, dict[str, Any]]:
        path = f"/api/v1/namespaces/{self._namespace}/pods?dryRun=All"
        return self._api("POST", path, pod(self._image, annotations))

    def untouched(self) -> str:
        status, answer = self.create({})
        if status != 201:
            raise Failed(f"a pod without annotations is refused ({status}): {answer.get('message')}")
        touched = [name for name in limits_of(answer) if name.startswith("valve.io/")]
        if touched:
            raise Failed(f"a pod without annotations was given {', '.join(touched)}")
        return "a pod without annotations passes as it is"

    def mutated(self) -> str:
        for asked, resource in (
            ({"valve.io/workload": "online"}, "valve.io/online-gpu"),
            ({"valve.io/workload": "offline", "valve.io/gpu-memory": "2Gi"}, "valve.io/offline-memory-gib"),
        ):
            status, answer = self.create(asked)
            if status != 201:
                raise Failed(f"a pod with {asked} is refused ({status}): {answer.get('message')}")
            if resource not in limits_of(answer):
                raise Failed(f"a pod with {asked} was not given {resource}")
        return "annotated pods ask for Valve's resources"

    def refused(self) -> str:
        status, answer = self.create({"valve.io/workload": "sometimes"})
        if status == 201:
            raise Failed("a pod with valve.io/workload: sometimes is accepted")
        return f"a contradiction is refused: {answer.get('message')}"

    def capacity(self) -> str:
        """A policy that is Ready must have put Valve's resources on a node."""
        ready = [item["metadata"]["name"] for item in self.served("colocationpolicies") if is_ready(item)]
        if not ready:
            return "no policy is Ready yet: nothing to ask of the nodes"
        status, answer = self._api("GET", "/api/v1/nodes", None)
        if status != 200:
            raise Failed(f"listing nodes gave {status}: {answer.get('message')}")
        offer = [
            node["metadata"]["name"]
            for node in answer["items"]
            if int(node["status"].get("allocatable", {}).get("valve.io/online-gpu", "0")) > 0
        ]
        if not offer:
            raise Failed(
                f"{', '.join(ready)} is Ready, but no node offers valve.io/online-gpu: look at the "
                "device plugins (kubectl get pods -A -l app.kubernetes.io/component=device-plugin)"
            )
        return f"{len(offer)} nodes offer valve.io/online-gpu"


def is_ready(item: dict[str, Any]) -> bool:
    conditions = item.get("status", {}).get("conditions", [])
    ready = [condition for condition in conditions if condition["type"] == "Ready"]
    return bool(ready) and ready[0]["status"] == "True" and item["status"].get("nodes", 0) > 0


def run(checks: list[tuple[str, Callable[[], str]]], patience_s: float) -> int:
    """A check may fail for a while: a webhook's endpoints and a policy take seconds to take effect."""
    failures = 0
    for name, check in checks:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                print(f"ok    {name}: {check()}", flush=True)
                break
            except (Failed, OSError) as error:
                if time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                print(f"FAIL  {name}: {error}", flush=True)
                failures += 1
                break
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check an installation of Valve from inside the cluster.")
    parser.add_argument("--namespace", required=True, help="where pods are asked for (dry run)")
    parser.add_argument("--image", required=True, help="image named in those pods; never pulled")
    parser.add_argument("--webhook", action="store_true", help="the mutating webhook is installed")
    parser.add_argument("--pod-policy", action="store_true", help="the pods' admission policy is installed")
    parser.add_argument("--patience", type=float, default=30.0, metavar="S", help="retry a check this long")
    arguments = parser.parse_args(argv)
    test = SelfTest(connect(dict(os.environ)), arguments.namespace, arguments.image)
    checks = [("CRDs", test.crds), ("plain pods", test.untouched)]
    if arguments.webhook:
        checks.append(("admission", test.mutated))
    if arguments.webhook or arguments.pod_policy:
        checks.append(("refusal", test.refused))
    checks.append(("capacity", test.capacity))
    return run(checks, arguments.patience)


if __name__ == "__main__":
    sys.exit(main())
