# SPDX-License-Identifier: Apache-2.0
"""One node: containerd and kubelet in namespaces of their own, where every path is the one of a real node.

/var/lib, /var/log, /run are folders of the node's state, /opt is a copy-on-write view: what pods write to
the node through hostPath volumes stays in the test. `path` gives the test's view of a node's path. Kernel
settings that the kubelet insists on look set and are not touched.
"""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster import cgroups
from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.errors import ClusterError
from e2e.cluster.images import small
from e2e.cluster.kubectl import is_ready
from e2e.cluster.network import Network
from e2e.cluster.processes import Program, Supervisor, tail
from e2e.cluster.programs import cni_plugins, kube, program, system_program

OWN_FOLDERS = {"var-lib": "/var/lib", "var-log": "/var/log", "run": "/run"}
"""Folder of the node's state -> where the node sees it."""
SETTINGS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/keys/root_maxbytes": 25_000_000,
}
"""What the kubelet would set for the whole machine (pkg/kubelet/cm/container_manager_linux.go)."""
CLEAR = """
awk '$5 ~ "^/(run|var/lib/kubelet)/" { print $5 }' /proc/self/mountinfo | sort -r | xargs -r umount -l
find /run -mindepth 1 -delete
mkdir /run/lock
"""
"""What a reboot does to mounts and to /run, which is in memory on a real node."""
DEV = "dev"
"""Folder of the node's state with the device files that the machine does not have."""
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
CONTAINERD_CONFIG = """\
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "{socket}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true  # lowering a score needs CAP_SYS_RESOURCE, which root in a container may lack
enable_cdi = true
cdi_spec_dirs = ["/var/run/cdi", "/etc/cdi"]
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{plugins}"]
conf_dir = "{state}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
SystemdCgroup = false
"""


@dataclass(frozen=True, slots=True)
class FakeDriver:
    """A driver that a node has and the machine has not (tests/fakenv)."""

    prefix: Sequence[str]
    """Words before a command that make it and all that it starts see the driver. containerd gets them, and so
    every container of the node."""
    nodes: Mapping[str, tuple[int, int]]
    """Device files of the node: name in /dev -> major, minor. As on any node, a privileged container has them
    and another one has what it is given."""


class Node:
    """Starts in the constructor; ready when `ready` says so (`Cluster` waits for it)."""

    def __init__(
        self,
        plane: ControlPlane,
        network: Network,
        state: Path,
        logs: Path,
        index: int,
        labels: Mapping[str, str],
        driver: FakeDriver | None = None,
    ) -> None:
        """Raises MissingError, StartError."""
        self.name = f"node-{index}"
        self.state = state
        self.address = network.node_address(index)
        self._plane = plane
        self._driver = driver
        self.cgroup = f"valve-e2e-{os.getpid()}-{network.number}-{index}"
        for folder in (*OWN_FOLDERS, "cni", "opt/upper", "opt/work", "settings"):
            (state / folder).mkdir(parents=True)
        (state / "run" / "lock").mkdir()
        binds = [(state / folder, place) for folder, place in OWN_FOLDERS.items()]
        for setting, value in SETTINGS.items():
            file = state / "settings" / setting.replace("/", "-")
            file.write_text(f"{value}\n")
            binds.append((file, f"/proc/sys/{setting}"))
        cgroups.create(self.cgroup)
        overlays = [(state / "opt", "/opt")]
        if driver is not None:
            overlays.append((self._make_devices(driver), "/dev"))
        self.supervisor = Supervisor(logs, isolate=True, binds=binds, overlays=overlays, cgroup=self.cgroup)
        try:
            network.attach(index, self.supervisor.pid)
            self.containerd = self._start_containerd(network.pods(index))
            self.kubelet = self._start_kubelet(labels)
        except BaseException:
            self.supervisor.close()
            raise

    def close(self) -> None:
        self.supervisor.close()

    def path(self, place: str) -> Path:
        """Where the test finds a path of this node."""
        for folder, target in OWN_FOLDERS.items():
            if place == target or place.startswith(target + "/"):
                return self.state / folder / place[len(target) + 1 :]
        if place.startswith("/opt/"):
            return self.state / "opt" / "upper" / place[len("/opt/") :]
        return Path(place)

    def _make_devices(self, driver: FakeDriver) -> Path:
        """What to lay over /dev: the machine's own folder must not get them."""
        for folder in ("upper", "work"):
            (self.state / DEV / folder).mkdir(parents=True)
        for name, (major, minor) in driver.nodes.items():
            node = self.state / DEV / "upper" / name
            os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(major, minor))
            node.chmod(0o666)
        return self.state / DEV

    def _start_containerd(self, pods: str) -> Program:
        (self.state / "cni" / "10-valve.conflist").write_text(json.dumps({
            "cniVersion": "1.0.0", "name": "pods", "plugins": [{
                "type": "bridge", "bridge": "pods0", "isGateway": True, "ipMasq": False, "hairpinMode": True,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": pods}]],
                         "routes": [{"dst": "0.0.0.0/0"}]},
            }],
        }))  # fmt: skip
        config = self.state / "containerd.toml"
        config.write_text(CONTAINERD_CONFIG.format(
            socket=CONTAINERD_SOCKET, pause=small.PAUSE, plugins=cni_plugins(), state=self.state,
            runc=system_program("runc"),
        ))  # fmt: skip
        binary = program("containerd")
        running = self.supervisor.start(
            "containerd", [*(self._driver.prefix if self._driver else ()), binary, "--config", config],
            {"PATH": f"{binary.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
        )  # fmt: skip
        running.until("its socket was there", self.path(CONTAINERD_SOCKET).exists)
        return running

    def _start_kubelet(self, labels: Mapping[str, str]) -> Program:
        authority = self._plane.authority
        serving = authority.leaf(
            f"{self.name}-serving", self.name, sans=[f"IP:{self.address}", f"DNS:{self.name}"]
        )
        client = authority.leaf(self.name, f"system:node:{self.name}", groups=["system:nodes"])
        kubeconfig = authority.client_kubeconfig(
            self.state / "kubelet.kubeconfig", self._plane.server, client
        )
        config = self.state / "kubelet.json"
        config.write_text(json.dumps({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
            "cgroupDriver": "cgroupfs", "cgroupRoot": f"/{self.cgroup}", "failCgroupV1": False,
            "failSwapOn": False, "makeIPTablesUtilChains": False, "resolvConf": "",
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%",
                             "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
            "tlsCertFile": str(serving.certificate), "tlsPrivateKeyFile": str(serving.key),
            "authentication": {"x509": {"clientCAFile": str(authority.ca.certificate)},
                               "webhook": {"enabled": True}, "anonymous": {"enabled": False}},
            "authorization": {"mode": "Webhook"},
            "nodeStatusUpdateFrequency": "2s", "syncFrequency": "10s",
        }))  # fmt: skip
        named = ",".join(f"{name}={value}" for name, value in labels.items())
        return self.supervisor.start("kubelet", [
            *kube("kubelet"), f"--config={config}", f"--kubeconfig={kubeconfig}", f"--node-ip={self.address}",
            f"--hostname-override={self.name}", "--oom-score-adj=0",
            *([f"--node-labels={named}"] if named else []),
        ])  # fmt: skip

    def ready(self, node: Mapping[str, Any]) -> bool:
        """Is this Node object Ready and free of its first taint? Raises ClusterError if a program died."""
        for running in (self.containerd, self.kubelet):
            if (code := running.returncode()) is not None:
                raise ClusterError(f"{self.name}: {running.name} ended with {code}:\n{tail(running.log)}")
        return is_ready(node) and not node["spec"].get("taints")

    def load_image(self, archive: Path) -> None:
        """Import a docker-archive tar."""
        self.ctr("images", "import", "--local", str(archive))

    def ctr(self, *arguments: str) -> str:
        address = ("--address", CONTAINERD_SOCKET, "--namespace", "k8s.io")
        said = self.supervisor.run([program("ctr", "containerd"), *address, *arguments])
        return "".join(line for line in said.splitlines(True) if not line.startswith('time="'))  # its log

    def stop_kubelet(self) -> None:
        """As a package upgrade does; pods go on."""
        self.kubelet.signal(signal.SIGTERM)
        self.kubelet.wait(20)

    def start_kubelet(self) -> None:
        self.kubelet.restart()

    def restart_kubelet(self) -> None:
        self.stop_kubelet()
        self.start_kubelet()

    def reboot(self) -> None:
        """End every process and mount of the node, empty /run, start containerd and the kubelet again.

        What a test runs on the node besides is gone; it starts that again itself.
        """
        self.supervisor.run(["sh", "-c", "kill -9 -1"])
        for running in (self.containerd, self.kubelet):
            running.wait(10)
        self.supervisor.run(["sh", "-c", CLEAR])
        self.containerd.restart()
        self.containerd.until("its socket was there", self.path(CONTAINERD_SOCKET).exists)
        self.start_kubelet()
