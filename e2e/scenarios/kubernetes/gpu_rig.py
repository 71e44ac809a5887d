# SPDX-License-Identifier: Apache-2.0
"""A cluster whose node has the fake NVIDIA driver, Valve on it with the nvidia device, and pods on its GPU.

Why it exists: kubelet, containerd, runc, chart, agent, device plugin and libvalve are the real ones; only
the driver is fake (tests/fakenv). The supervisor answers device files by their path and has no device
cgroup; `need_nodes` makes it answer only where the container was given the file, so a container without a
GPU has none. What NVIDIA's container toolkit does on a real node is done here as it does it: a CDI spec with
device files and libraries.

Threading model: the test's thread.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import fakenv
from e2e.cluster.cluster import Cluster
from e2e.cluster.images import small
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.node import FakeDriver
from e2e.cluster.processes import wait_for
from e2e.scenarios.kubernetes import product
from e2e.scenarios.kubernetes.tenants import PROGRAMS, mounted

GPU_MIB = 2048
UUIDS = [f"GPU-66616b65-6e76-2d67-7075-2d75756964{number:02x}" for number in range(2)]
"""The fake's GPUs, as NVML says them: the 16 bytes are "fakenv-gpu-uuid" and the number."""
NODES = {"nvidiactl": (195, 255), "nvidia0": (195, 0), "nvidia1": (195, 1), "nvidia-uvm": (511, 0)}
POLICY: dict[str, Any] = {
    "apiVersion": "valve.io/v1alpha1",
    "kind": "ColocationPolicy",
    "metadata": {"name": "gpus"},
    "spec": {
        "nodeSelector": {product.LABEL: "true"},
        "compute": {"lease": "2s", "recoveryGrace": "500ms", "cooldown": {"min": "20ms", "max": "200ms"}},
        "memory": {"slabSize": "32Mi", "reservation": {"min": "32Mi", "max": "64Mi", "quietPeriod": "60s"}},
        "offline": {"defaultMemory": "100%"},
    },
}
NAMESPACE = "gpu"
PORT = 9000
ANSWER_S = 60
ONLINE = {"valve.io/workload": "online"}
OFFLINE = {"valve.io/workload": "offline", "valve.io/gpu-memory": "1Gi"}
ENGINE = """
from valve_runtime import _lib
valve = _lib.load()
assert valve.attach(20_000), valve.last_error()
"""
VICTIM = """
import driver_api
cu = driver_api.Cuda()
out = cu.host(4096)
result = out
"""
LONG_US = 600_000_000


def driver(machine: fakenv.Machine) -> FakeDriver:
    return FakeDriver(machine.prefix(), NODES)


def write_cdi_spec(cluster: Cluster, folder: Path) -> None:
    """What nvidia-ctk would write: a GPU by its UUID, its driver files and libraries."""
    place = str(folder)
    spec = {
        "cdiVersion": "0.6.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {"name": name, "containerEdits": {"deviceNodes": [{"path": f"/dev/nvidia{number}"}]}}
            for number, name in enumerate(UUIDS)
        ],
        "containerEdits": {
            "deviceNodes": [{"path": "/dev/nvidiactl"}, {"path": "/dev/nvidia-uvm"}],
            "mounts": [{"hostPath": place, "containerPath": place, "options": ["ro", "rbind"]}],
            "env": [f"LD_LIBRARY_PATH={place}"],
        },
    }
    for node in cluster.nodes:
        specs = node.path("/run/cdi")
        specs.mkdir(exist_ok=True)
        (specs / "nvidia.json").write_text(json.dumps(spec))


def install(cluster: Cluster, folder: Path, values: Path) -> None:
    """Valve with the nvidia device, and NAMESPACE. `folder`: the fake's libraries; `values`: a file to
    write."""
    place = str(folder)
    values.write_text(yaml.safe_dump({
        "agent": {
            "extraEnv": [{"name": "LD_LIBRARY_PATH", "value": place}],
            "extraVolumes": [{"name": "driver", "hostPath": {"path": place, "type": "Directory"}}],
            "extraVolumeMounts": [{"name": "driver", "mountPath": place, "readOnly": True}],
        },
        # this kubelet never restarts: pods that are gone need not count for a minute after its start
        "devicePlugin": {"gpuAccess": "cdi", "extraArgs": ["--settle=3"]},
    }))  # fmt: skip
    write_cdi_spec(cluster, folder)
    product.install(cluster, POLICY, "nvidia", values, len(UUIDS))
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.kubectl.until("its account", ["sa", "default", "-n", NAMESPACE], lambda _: True)


def manifest(
    namespace: str, name: str, annotations: Mapping[str, str], driver: Path | None
) -> dict[str, Any]:
    """A pod with Python and the actor; nothing in it names a GPU, a device file or a library. With `driver`,
    a folder of libraries, it takes all of that by itself: a privileged one."""
    base = sys.base_prefix
    mounts, volumes = mounted(["/usr", base, str(PROGRAMS), *([str(driver)] if driver else [])])
    container: dict[str, Any] = {}
    if driver is not None:
        env = [{"name": "LD_LIBRARY_PATH", "value": str(driver)}]
        container = {"securityContext": {"privileged": True}, "env": env}
    command = [f"{base}/bin/python3", "-S", str(PROGRAMS / "gpu_actor.py"), str(PORT)]
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "annotations": dict(annotations)},
        "spec": {
            "terminationGracePeriodSeconds": 1, "restartPolicy": "Never",
            "containers": [{"name": "main", "image": small.HOST, "command": command, "volumeMounts": mounts,
                            **container}],
            "volumes": volumes,
        },
    }  # fmt: skip


class GpuPod:
    """A running pod whose process does as it is told; see programs/gpu_actor.py."""

    def __init__(
        self,
        kubectl: Kubectl,
        machine: fakenv.Machine,
        namespace: str,
        name: str,
        annotations: Mapping[str, str],
        driver: Path | None = None,
    ) -> None:
        """Returns when the process answers."""
        self.kubectl, self.machine, self.namespace, self.name = kubectl, machine, namespace, name
        kubectl.apply(manifest(namespace, name, annotations, driver))
        self.pod = self.until("runs", lambda pod: pod["status"].get("phase") == "Running")
        self._out = 0
        self.gpu = ""
        """Of an annotated pod: what the device plugin gave to it."""
        self._links: list[socket.socket] = []
        wait_for(f"{name} listens", self._connect, ANSWER_S)
        self.gpu = str(self.run("import os; result = os.environ.get('VALVE_GPU', '')"))

    def _connect(self) -> bool:
        try:
            link = socket.create_connection((self.pod["status"]["podIP"], PORT), timeout=ANSWER_S)
        except OSError:
            return False
        self._links.append(link)
        return True

    def until(self, what: str, ready: Any) -> dict[str, Any]:
        return self.kubectl.until(f"{self.name} {what}", ["pod", self.name, "-n", self.namespace], ready)

    def restarts(self) -> int:
        """Of its container; raises AssertionError where it does not run."""
        status = self.kubectl.get("pod", self.name, "-n", self.namespace)["status"]
        assert status["phase"] == "Running", status
        return int(status["containerStatuses"][0]["restartCount"])

    def start(self, code: str) -> None:
        """Send code whose end is not waited for."""
        self._links[-1].sendall(json.dumps({"code": code}).encode() + b"\n")

    def run(self, code: str) -> Any:
        """What the code leaves in `result`. Raises AssertionError with its traceback."""
        self.start(code)
        data = b""
        while not data.endswith(b"\n"):
            chunk = self._links[-1].recv(1 << 16)
            assert chunk, f"{self.name} ended"
            data += chunk
        answer = json.loads(data)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def launch(self) -> None:
        """Start a kernel that runs for minutes and writes the clock all along."""
        self._out = int(self.run(VICTIM))
        self.run(f"cu.launch('timer_writer', out, {LONG_US})")

    def is_held(self) -> bool:
        """Whether the driver runs none of its work: the compute channels of its processes are disabled."""
        status = self.machine.status()
        pids = set(self.pids())
        ours = {client["handle"] for client in status["clients"] if client["pid"] in pids}
        found = [entry for entry in status["channels"] if entry["client"] in ours and entry["engine"] == 1]
        return bool(found) and all(entry["disabled"] for entry in found)

    def pids(self) -> list[int]:
        """Its processes that use the GPU, as this machine calls them."""
        uid = self.pod["metadata"]["uid"]
        using = {int(client["pid"]) for client in self.machine.status()["clients"]}
        return [pid for pid in using if uid in _cgroups(pid)]

    def pid_on_node(self) -> int:
        """Its process as the node, and so the agent, calls it."""
        (pid,) = self.pids()
        (names,) = [
            line.split()[1:]
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("NSpid:")
        ]
        return int(names[1])  # this machine's, the node's, the container's

    def stamp(self) -> tuple[int, int]:
        """What its kernel wrote last, read in its memory without its help."""
        (pid,) = self.pids()
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(self._out)
            first, second = struct.unpack("QQ", memory.read(16))
        return first, second

    def close(self) -> None:
        for link in self._links:
            link.close()


def _cgroups(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended since
        return ""
