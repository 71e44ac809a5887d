# SPDX-License-Identifier: Apache-2.0
"""Real operators beside a real API server: processes with the rights that the chart gives, killed at will.

What the chart installs is rendered by helm and applied as it is, but for what needs a kubelet (Deployment,
Service) and the webhooks' address, which becomes this machine's. Callers: the tests beside it.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml

from e2e.cluster.control_plane import ControlPlane, free_ports
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.programs import program
from valve_operator.cases import Case

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]
NAMESPACE = "valve-system"
ACCOUNT = "valve-operator"
LEASE = "valve-operator"
OWNER = "valve-node"
NEEDS_PODS = {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "Secret", "Pod", "Job"}
TIMEOUT_S = 60.0


def eventually(what: str, holds: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """The first true value of `holds`."""
    end_s = time.monotonic() + timeout_s
    while True:
        value = holds()
        if value:
            return value
        assert time.monotonic() < end_s, f"not within {timeout_s:.0f}s: {what}"
        time.sleep(0.1)


def rendered() -> list[Json]:
    """Every object of the chart."""
    command = [program("helm"), "template", "valve", ROOT / "charts/valve", f"--namespace={NAMESPACE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


class Installed:
    """The chart on a control plane, without what runs."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.plane = plane
        self.kubectl = plane.kubectl
        self.folder = folder
        self.webhook_port = free_ports(1)[0]
        self.pair = plane.authority.leaf("webhook", "valve-webhook", sans=["IP:127.0.0.1"])
        self.templates = folder / "node-templates"
        self.templates.mkdir()
        plane.kubectl("create", "namespace", NAMESPACE)
        objects = [entry for entry in rendered() if entry["kind"] not in NEEDS_PODS]
        for entry in objects:
            if "agent.yaml" in entry.get("data", {}):
                for name, text in entry["data"].items():
                    (self.templates / name).write_text(text)
            if entry["kind"].endswith("WebhookConfiguration"):
                self._serve_here(entry)
        kinds = [entry for entry in objects if entry["kind"] == "CustomResourceDefinition"]
        rest = [entry for entry in objects if entry["kind"] != "CustomResourceDefinition"]
        self.kubectl.apply({"apiVersion": "v1", "kind": "List", "items": kinds})
        self.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        self.kubectl.apply({"apiVersion": "v1", "kind": "List", "items": rest})
        self.account = plane.service_account(NAMESPACE, ACCOUNT)

    def _serve_here(self, entry: Json) -> None:
        authority = base64.b64encode(Path(self.plane.authority.ca.certificate).read_bytes()).decode()
        for webhook in entry["webhooks"]:
            path = webhook["clientConfig"]["service"]["path"]
            url = f"https://127.0.0.1:{self.webhook_port}{path}"
            webhook["clientConfig"] = {"url": url, "caBundle": authority}

    def replica(self, name: str, *flags: str, webhook: bool = True) -> Replica:
        """An operator, started."""
        serves = [
            f"--webhook-port={self.webhook_port}",
            f"--webhook-cert={self.pair.certificate}",
            f"--webhook-key={self.pair.key}",
            "--webhook-address=127.0.0.1",
            "--online-priority-class=valve-online",
            "--offline-priority-class=valve-offline",
        ]
        return Replica(self, name, [*flags, *(serves if webhook else [])])

    def node(self, name: str, gib: int = 64, **labels: str) -> None:
        """A Node object that is ready; no kubelet."""
        meta = {"name": name, "labels": labels}
        self.kubectl.apply({"apiVersion": "v1", "kind": "Node", "metadata": meta})
        amounts = {"valve.io/offline-memory-gib": str(gib), "cpu": "64", "memory": "256Gi", "pods": "110"}
        status = {
            "conditions": [{"type": "Ready", "status": "True", "reason": "Test", "message": ""}],
            "capacity": amounts,
            "allocatable": amounts,
        }
        self.patch_status("node", name, status)

    def patch_status(self, kind: str, name: str, status: Json, *where: str) -> None:
        patch = json.dumps({"status": status})
        self.kubectl("patch", kind, name, *where, "--subresource=status", "--type=merge", "-p", patch)

    def policy(self, name: str, **spec: Any) -> None:
        self.kubectl.apply(
            {
                "apiVersion": "valve.io/v1alpha1",
                "kind": "ColocationPolicy",
                "metadata": {"name": name},
                "spec": spec,
            }
        )

    def report(self, name: str, **gpu: Any) -> None:
        """What the node's agent would say."""
        generation = self.kubectl.get("colonode", name)["metadata"]["generation"]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        ready = {"type": "Ready", "status": "True", "reason": "Follows", "lastTransitionTime": now}
        entry = {"id": "GPU-1", "preemptLatency": {"p99Us": 400}, **gpu}
        status = {
            "observedGeneration": generation,
            "reportedAt": now,
            "conditions": [ready],
            "gpus": [entry],
        }
        self.patch_status("colonode", name, status)

    def condition(self, policy: str, kind: str) -> Json:
        status = self.kubectl.get("colo", policy).get("status") or {}
        return next((c for c in status.get("conditions") or () if c["type"] == kind), {})

    def holder(self) -> str:
        """Who holds the Lease."""
        leases = self.kubectl.get("lease", "-n", NAMESPACE)["items"]
        found = [
            lease["spec"].get("holderIdentity") or ""
            for lease in leases
            if lease["metadata"]["name"] == LEASE
        ]
        return found[0] if found else ""

    def clean(self) -> None:
        """Removes what a test made in the cluster."""
        self.kubectl("delete", "colo,colonode,node", "--all", "--wait=false")
        self.kubectl("delete", "daemonset", "--all", "-n", NAMESPACE, "--wait=false")
        self.kubectl("delete", "lease", LEASE, "-n", NAMESPACE, "--ignore-not-found")


class Replica:
    """One operator process; `with` ends it."""

    def __init__(self, installed: Installed, name: str, flags: list[str]) -> None:
        self.name = name
        self.log = installed.folder / f"{name}.log"
        self.health_port, self.metrics_port = free_ports(2)
        command = [
            sys.executable,
            "-m",
            "valve_operator",
            f"--namespace={NAMESPACE}",
            f"--node-templates={installed.templates}",
            f"--owner={OWNER}",
            f"--lease={LEASE}",
            f"--identity={name}",
            f"--kubeconfig={installed.account.kubeconfig}",
            f"--health-port={self.health_port}",
            f"--metrics-port={self.metrics_port}",
            *flags,
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def __enter__(self) -> Replica:
        eventually(f"{self.name} is ready; its log:\n{self.tail}", self.ready)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()
        if kind is not None:
            print(f"--- log of {self.name}\n{self.tail}")

    @property
    def tail(self) -> str:
        return self.log.read_text()[-6000:]

    def ready(self) -> bool:
        assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.tail}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/readyz", timeout=2):
                return True
        except OSError:
            return False

    def metrics(self) -> dict[str, float]:
        """Samples by name, labels included."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def requests(self) -> float:
        """Requests to the API server so far, watches not counted."""
        return sum(
            v for name, v in self.metrics().items() if name.startswith("valve_operator_requests_total")
        )

    @property
    def rss_mib(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    def kill(self) -> None:
        """SIGKILL: nothing is given up, nothing is finished."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return self.process.returncode


def names(kubectl: Kubectl, *what: str) -> set[str]:
    return {entry["metadata"]["name"] for entry in kubectl.get(*what)["items"]}


def as_kubernetes_wants(case: Case) -> dict[str, Any]:
    """The pod with what the API server itself demands, so that only Valve can refuse it."""
    pod = case.pod()
    pod["metadata"]["name"] = "case"
    for container in pod["spec"]["containers"]:
        container["image"] = "x"
        mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
        if mounts:
            pod["spec"]["volumes"] = [{"name": name, "emptyDir": {}} for name in mounts]
    return pod


def create(installed: Installed, pod: dict[str, Any]) -> dict[str, Any]:
    """What the API server would store. Raises Refused."""
    text = installed.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(pod))
    made: dict[str, Any] = json.loads(text)
    return made
