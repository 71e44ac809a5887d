# SPDX-License-Identifier: Apache-2.0
"""The wires of a cluster: one bridge in the control plane's network, and a veth to each node and to the host.

    host  10.213.K.1 ── bridge of the control plane 10.213.K.2 (and 10.96.0.1) ── node i  10.213.K.(10+i)
                                                                                    └ pods 10.(128+K).i.0/24

The host can reach nodes and pods (load generators, Prometheus); nothing inside can reach the internet. K is
the first number whose interface the host does not have, so clusters run side by side. Every interface ends
with the namespaces of the processes that own its other end: there is nothing to clean up.

There is no kube-proxy: the one service address that works inside is the API's own, because the control plane
listens on it. The operator's webhook is called at its pod's address, which the apiserver does by itself.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.control_plane import KUBERNETES_SERVICE
from e2e.cluster.errors import ClusterError, MissingError
from e2e.cluster.programs import system_program

CLUSTERS = 64
"""How many may run side by side: what fits between 10.128 and 10.191."""


def ip(*arguments: str, inside: int | None = None) -> None:
    """Run `ip ARGUMENTS`, in the network of a process if one is given. Raises ClusterError."""
    enter = [str(system_program("nsenter")), f"--net=/proc/{inside}/ns/net"] if inside else []
    command = [*enter, str(system_program("ip")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Network:
    """`number` is K above; `hub` is a process in the control plane's network."""

    number: int
    hub: int

    @property
    def host_address(self) -> str:
        return f"10.213.{self.number}.1"

    @property
    def hub_address(self) -> str:
        return f"10.213.{self.number}.2"

    @property
    def interface(self) -> str:
        """The host's end."""
        return f"valve-e2e{self.number}"

    def node_address(self, index: int) -> str:
        return f"10.213.{self.number}.{10 + index}"

    def pods(self, index: int) -> str:
        """The addresses of a node's pods."""
        return f"10.{128 + self.number}.{index}.0/24"

    def attach(self, index: int, pid: int) -> None:
        """Wire up node `index`, whose network a process `pid` is in."""
        wire, address = f"node{index}", self.node_address(index)
        ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", str(pid), inside=self.hub)
        ip("link", "set", wire, "master", "bridge0", "up", inside=self.hub)
        ip("link", "set", "lo", "up", inside=pid)
        ip("address", "add", f"{address}/24", "dev", "eth0", inside=pid)
        ip("link", "set", "eth0", "up", inside=pid)
        ip("route", "add", "default", "via", self.hub_address, inside=pid)
        ip("route", "add", self.pods(index), "via", address, inside=self.hub)


def create(hub: int) -> Network:
    """Make the bridge in the network of process `hub` and connect the host to it.

    Raises MissingError when this user may not make interfaces.
    """
    network = _claim(hub)
    ip("link", "set", "lo", "up", inside=hub)
    ip("address", "add", f"{KUBERNETES_SERVICE}/32", "dev", "lo", inside=hub)
    ip("link", "add", "bridge0", "type", "bridge", inside=hub)
    ip("address", "add", f"{network.hub_address}/24", "dev", "bridge0", inside=hub)
    ip("link", "set", "bridge0", "up", inside=hub)
    ip("link", "set", "host", "master", "bridge0", "up", inside=hub)
    ip("address", "add", f"{network.host_address}/24", "dev", network.interface)
    ip("link", "set", network.interface, "up")
    ip("route", "add", f"10.{128 + network.number}.0.0/16", "via", network.hub_address)
    return network


def _claim(hub: int) -> Network:
    """Take the first free number; the kernel decides when two clusters start at once."""
    for number in range(CLUSTERS):
        network = Network(number, hub)
        if Path("/sys/class/net", network.interface).exists():
            continue
        try:
            ip("link", "add", network.interface, "type", "veth", "peer", "name", "host", "netns", str(hub))
        except ClusterError as error:
            if "File exists" in str(error):
                continue
            raise MissingError(f"a cluster with nodes needs CAP_NET_ADMIN: {error}") from error
        return network
    raise ClusterError(f"{CLUSTERS} test clusters run already: stop some")
