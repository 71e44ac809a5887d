# SPDX-License-Identifier: Apache-2.0
"""The device plugin on a real node, beside an agent whose words the test chooses.

The plugin is the product's, run as a program of the node (what its pod would do, without the pod's start
and stop). The agent is a stand-in that answers on the status socket, so that a test can lend more or less
memory at once. Single-threaded but for the stand-in's thread.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc

from e2e.cluster.images import small
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.node import Node
from e2e.cluster.processes import Program, wait_for
from e2e.scenarios.kubernetes import product
from valve_api.names import RESOURCE_OFFLINE_MEMORY as OFFLINE
from valve_api.names import RESOURCE_ONLINE_GPU as ONLINE
from valve_kubelet import calls
from valve_kubelet import podresources_pb2 as pr

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("crds", "node_agent", "cli", "deviceplugin")
GIB = 1 << 30
MEMORY_GIB = 8
GPUS = ("GPU-aaaaaaaa-0000-0000-0000-000000000000", "GPU-bbbbbbbb-0000-0000-0000-000000000000")
TOTAL = MEMORY_GIB * len(GPUS)
SAY = "env | grep ^VALVE_ | sort; echo end; trap 'exit 0' TERM; "
STARTED, REGISTERED = '"event": "start"', '"event": "register"'
FOREVER = SAY + "while :; do sleep 0.1; done"
"""Says what it was given; ends when it is sent SIGTERM, which is how a test restarts it."""
BRIEFLY = SAY + "sleep 1"


class AgentStandIn:
    """Answers on the agent's status socket. `lendable_gib` may be changed at any time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lendable_gib = dict.fromkeys(GPUS, MEMORY_GIB)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen(8)
        self._thread = threading.Thread(target=self._serve, name="agent-stand-in", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return  # closed
            with client:
                client.sendall(json.dumps(self._status()).encode())

    def _status(self) -> dict[str, Any]:
        return {"schema": "valve.io/status/v1", "gpus": [
            {"id": gpu, "memory_bytes": MEMORY_GIB * GIB, "lendable_bytes": lendable * GIB,
             "online_tenants": 0}
            for gpu, lendable in self.lendable_gib.items()
        ]}  # fmt: skip

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()


class PluginRig:
    """A node, its device plugin, and what the kubelet says of both."""

    def __init__(self, node: Node, kubectl: Kubectl, python: Path) -> None:
        self.node, self.kubectl = node, kubectl
        self.agent = AgentStandIn(node.path("/run/valve/agent.sock.status"))
        self._python = python
        self._environment = {"PYTHONPATH": ":".join(str(ROOT / folder) for folder in SOURCES)}
        installed = self._run(
            "install", "install-runtime", "--from", str(ROOT / "build/runtime"), "--to", "/opt/valve"
        )
        installed.wait(20)
        self.library = installed.log.read_text().splitlines()[-1]
        self.plugin = self._start()

    def _run(self, name: str, *arguments: str) -> Program:
        command = [self._python, "-m", "valve_deviceplugin", *arguments]
        return self.node.supervisor.start(f"device-plugin-{name}", command, self._environment)

    def _start(self) -> Program:
        count = self._logged(STARTED)
        plugin = self._run(
            "serve", f"--library={self.library}", f"--node={self.node.name}", "--injection=cdi",
            "--stand=0.5", "--grace=5", "--settle=3", "--release-after=1",
        )  # fmt: skip
        plugin.until("it served", lambda: self._logged(STARTED) > count, 20)
        return plugin

    def _logged(self, event: str) -> int:
        """How often the plugin has written this, those of earlier rigs on the node included."""
        log = self.node.supervisor.logs / "device-plugin-serve.log"
        return log.read_text().count(event) if log.exists() else 0

    def close(self) -> None:
        """What it wrote on the node goes too, as if it had not been there."""
        self.plugin.stop()
        self.agent.close()
        for place in ("/run/valve", "/var/lib/valve", "/opt/valve", "/run/cdi"):
            self.node.supervisor.run(["rm", "-rf", place])

    # The node's programs

    def stop_plugin(self) -> None:
        self.plugin.signal(signal.SIGTERM)
        assert self.plugin.wait(20) == 0

    def start_plugin(self) -> None:
        """Returns when it serves, so that a stop that follows is a stop and not an interrupted start."""
        count = self._logged(STARTED)
        self.plugin.restart()
        self.plugin.until("it served", lambda: self._logged(STARTED) > count, 20)

    def kubelet_ready(self) -> None:
        """Wait until the kubelet answers about pods."""

        def answers() -> bool:
            try:
                self.pod_resources()
            except grpc.RpcError:
                return False
            return True

        wait_for("the kubelet answers", answers, 60)

    def start_kubelet(self, start: Callable[[], None] | None = None) -> None:
        """Start it (or do what does so); returns when it answers and knows the plugin, if that runs.

        A pod that comes in between is rejected by the kubelet, ours or any other plugin's.
        """
        count = self._logged(REGISTERED)
        (start or self.node.start_kubelet)()
        self.kubelet_ready()
        if self.plugin.returncode() is None:
            wait_for("both resources are registered", lambda: self._logged(REGISTERED) >= count + 2, 60)

    def reboot(self) -> None:
        """The node comes back without the device plugin, with an agent; returns when the kubelet answers."""
        self.agent.close()
        self.start_kubelet(self.node.reboot)
        self.agent = AgentStandIn(self.node.path("/run/valve/agent.sock.status"))

    def restart_kubelet(self) -> None:
        self.start_kubelet(self.node.restart_kubelet)

    def settle(self) -> None:
        """Everything as at the start: both programs run, all memory is lent."""
        self.agent.lendable_gib = dict.fromkeys(GPUS, MEMORY_GIB)
        if self.node.kubelet.returncode() is not None:
            self.start_kubelet()
        if self.plugin.returncode() is not None:
            self.start_plugin()
        self.until_offline(TOTAL, TOTAL)

    # What the cluster says

    def until_offline(self, allocatable: int, capacity: int, timeout_s: float = 40) -> None:
        """Wait until the node has so many units of offline memory."""

        def has(node: dict[str, Any]) -> bool:
            found = [int(node["status"][field].get(OFFLINE, -1)) for field in ("allocatable", "capacity")]
            return found == [allocatable, capacity]

        self.kubectl.until(f"{allocatable} of {capacity}", ["node", self.node.name], has, timeout_s)

    def pod_resources(self) -> pr.ListPodResourcesResponse:
        socket_path = self.node.path("/var/lib/kubelet/pod-resources/kubelet.sock")
        with calls.channel(socket_path) as channel:
            return calls.LIST_PODS.call(channel)(pr.ListPodResourcesRequest(), timeout=5)

    def devices(self, namespace: str, pod: str) -> dict[str, list[str]]:
        """Container -> ids of offline memory that the kubelet keeps for it."""
        return {
            container.name: sorted(
                name
                for entry in container.devices
                if entry.resource_name == OFFLINE
                for name in entry.device_ids
            )
            for found in self.pod_resources().pod_resources
            if (found.namespace, found.name) == (namespace, pod)
            for container in found.containers
        }

    def until_devices(self, namespace: str, pod: str, held: dict[str, list[str]]) -> None:
        """Wait until the kubelet keeps exactly these; one that has just started lists pods a little later."""
        wait_for(f"{pod} holds {held}", lambda: self.devices(namespace, pod) == held, 60)

    def allocations(self) -> list[dict[str, Any]]:
        """The plugin's published allocations, fresh."""
        return product.allocations(self.node)

    def owners(self) -> set[tuple[str, str, str]]:
        return {
            (own["namespace"], own["pod"], own["container"])
            for entry in self.allocations()
            if (own := entry["owner"])
        }

    # Pods

    def start(self, namespace: str, name: str, gib: int = 2, script: str = FOREVER, **spec: Any) -> None:
        self.kubectl.apply(pod(namespace, name, gib, script, **spec))

    def until_phase(self, namespace: str, name: str, phase: str, timeout_s: float = 60) -> dict[str, Any]:
        return self.kubectl.until(
            phase,
            ["pod", name, "-n", namespace],
            lambda found: found["status"].get("phase") == phase,
            timeout_s,
        )

    def said(self, namespace: str, name: str, container: str = "main") -> dict[str, str]:
        """The VALVE_ environment that a container printed when it last started."""

        def text() -> str:
            return self.kubectl("logs", name, "-n", namespace, "-c", container)

        wait_for(f"{name} said what it got", lambda: "end" in text().splitlines(), 60)
        return dict(line.split("=", 1) for line in text().splitlines() if "=" in line)

    def restart_container(self, namespace: str, name: str) -> None:
        """End the pod's container and wait for its successor."""
        count = self.restarts(namespace, name)
        self.kubectl("exec", name, "-n", namespace, "--", "kill", "1")

        def again(found: dict[str, Any]) -> bool:
            state = found["status"]["containerStatuses"][0]
            return bool(state["restartCount"] == count + 1 and "running" in state["state"])

        self.kubectl.until("the container restarted", ["pod", name, "-n", namespace], again, 60)

    def restarts(self, namespace: str, name: str) -> int:
        count: int = self.kubectl.get("pod", name, "-n", namespace)["status"]["containerStatuses"][0][
            "restartCount"
        ]
        return count

    def delete(self, namespace: str, names: Iterable[str]) -> None:
        self.kubectl("delete", "pod", *names, "-n", namespace, "--wait=true", timeout_s=90)


def container(name: str, gib: int, script: str, **fields: Any) -> dict[str, Any]:
    limits = {"resources": {"limits": {OFFLINE: str(gib)}}} if gib else {}
    return {"name": name, "image": small.BUSYBOX, "command": ["sh", "-c", script]} | limits | fields


def pod(namespace: str, name: str, gib: int, script: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [container("main", gib, script)]} | spec,
    }  # fmt: skip


__all__ = [
    "BRIEFLY",
    "FOREVER",
    "GPUS",
    "MEMORY_GIB",
    "OFFLINE",
    "ONLINE",
    "TOTAL",
    "PluginRig",
    "container",
    "pod",
]
