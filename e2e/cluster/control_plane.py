# SPDX-License-Identifier: Apache-2.0
"""A real apiserver with its etcd, and on request the controller manager and the scheduler.

    with ControlPlane() as plane:
        plane.kubectl.apply(Path("crds"))
        as_agent = plane.service_account("valve-system", "valve-agent")  # a Kubectl with its token

On loopback with free ports by default, so it needs no root and any number run side by side; `Cluster`
starts it inside its own network instead. Up in about three seconds. Nothing survives the test, even if that
is killed.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from e2e.cluster.kubectl import Kubectl
from e2e.cluster.pki import Authority
from e2e.cluster.processes import Program, Supervisor
from e2e.cluster.programs import kube

SERVICES = "10.96.0.0/16"
KUBERNETES_SERVICE = "10.96.0.1"
"""The first address of SERVICES: what pods know as kubernetes.default."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class ControlPlane:
    """`kubeconfig` and `kubectl` are the cluster administrator's."""

    def __init__(
        self,
        state: Path | None = None,
        *,
        controllers: bool = False,
        supervisor: Supervisor | None = None,
        address: str = "127.0.0.1",
        port: int | None = None,
    ) -> None:
        """Starts it and returns when it serves. Raises MissingError, StartError.

        state        where to keep everything; default: a temporary folder, removed at the end
        controllers  also the controller manager (garbage collection, DaemonSets, namespace deletion) and the
                     scheduler
        supervisor   who runs the processes; default: one of our own, ended by `close`
        address      where it listens and is reached
        """
        self._temporary = state is None
        self.state = state or Path(tempfile.mkdtemp(prefix="valve-plane-"))
        self._own = supervisor is None
        self.supervisor = supervisor or Supervisor(
            self.state / "logs", remove=self.state if self._temporary else None
        )
        try:
            self.address = address
            etcd_port, peer_port, *ports = (
                free_ports(5) if address == "127.0.0.1" else [2379, 2380, 443, 10257, 10259]
            )
            self.port, self._manager_port, self._scheduler_port = port or ports[0], ports[1], ports[2]
            self.server = f"https://{address}:{self.port}"
            self.authority = Authority(self.state / "pki")
            self.kubeconfig = self._kubeconfig("admin", "kubernetes-admin", "system:masters")
            self.kubectl = Kubectl(self.kubeconfig)
            self.etcd = self._start_etcd(etcd_port, peer_port)
            self.apiserver = self._start_apiserver(f"http://127.0.0.1:{etcd_port}")
            if controllers:
                self.start_controllers()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ControlPlane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._own:
            self.supervisor.close()

    def _kubeconfig(self, name: str, user: str, *groups: str) -> Path:
        pair = self.authority.leaf(name, user, groups=groups)
        return self.authority.client_kubeconfig(self.state / f"{name}.kubeconfig", self.server, pair)

    def _start_etcd(self, client_port: int, peer_port: int) -> Program:
        client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
        return self.supervisor.start("etcd", [
            *kube("etcd"), f"--data-dir={self.state}/etcd", f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync", "--log-level=warn",
        ])  # fmt: skip

    def _start_apiserver(self, etcd: str) -> Program:
        loopback = self.address == "127.0.0.1"
        sans = ["DNS:kubernetes.default.svc", "DNS:localhost", f"IP:{KUBERNETES_SERVICE}", "IP:127.0.0.1"]
        serving = self.authority.leaf("apiserver", "kube-apiserver", sans=[*sans, f"IP:{self.address}"])
        to_kubelets = self.authority.leaf("apiserver-kubelet", "kube-apiserver", groups=["system:masters"])
        ca, accounts = self.authority.ca.certificate, self.authority.service_accounts
        program = self.supervisor.start("kube-apiserver", [
            *kube("kube-apiserver"), f"--etcd-servers={etcd}", f"--advertise-address={self.address}",
            f"--bind-address={'127.0.0.1' if loopback else '0.0.0.0'}", f"--secure-port={self.port}",
            # loopback is no legal endpoint of the `kubernetes` service; without pods nobody needs one
            f"--endpoint-reconciler-type={'none' if loopback else 'lease'}",
            f"--tls-cert-file={serving.certificate}", f"--tls-private-key-file={serving.key}",
            f"--client-ca-file={ca}", "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={accounts.certificate}",
            f"--service-account-signing-key-file={accounts.key}",
            f"--service-cluster-ip-range={SERVICES}", "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
            f"--kubelet-client-certificate={to_kubelets.certificate}",
            f"--kubelet-client-key={to_kubelets.key}",
            f"--kubelet-certificate-authority={ca}", "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={ca}", "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--enable-aggregator-routing=true",  # webhooks are called at endpoints: no kube-proxy
        ])  # fmt: skip
        program.until("it was ready", self.ready)
        return program

    def start_controllers(self) -> None:
        """The controller manager and the scheduler; they end at once before the apiserver's RBAC exists."""
        manager = self._kubeconfig("controller-manager", "system:kube-controller-manager")
        self.controller_manager = self.supervisor.start("kube-controller-manager", [
            *kube("kube-controller-manager"), *credentials(manager), "--use-service-account-credentials",
            f"--service-account-private-key-file={self.authority.service_accounts.key}",
            f"--root-ca-file={self.authority.ca.certificate}", "--leader-elect=false",
            "--bind-address=127.0.0.1", f"--secure-port={self._manager_port}",
            "--node-monitor-period=1s",  # how late a new node's first taint goes
            # on loopback Nodes have no kubelet: without heartbeats they would be lost within a minute
            *(["--node-monitor-grace-period=24h"] if self.address == "127.0.0.1" else []),
        ])  # fmt: skip
        scheduler = self._kubeconfig("scheduler", "system:kube-scheduler")
        self.scheduler = self.supervisor.start("kube-scheduler", [
            *kube("kube-scheduler"), *credentials(scheduler), "--leader-elect=false",
            "--bind-address=127.0.0.1", f"--secure-port={self._scheduler_port}",
        ])  # fmt: skip

    def ready(self) -> bool:
        """True when /readyz says so."""
        context = ssl.create_default_context(cafile=str(self.authority.ca.certificate))
        admin = self.authority.folder / "admin"
        context.load_cert_chain(admin.with_suffix(".crt"), admin.with_suffix(".key"))
        connection = http.client.HTTPSConnection(self.address, self.port, context=context, timeout=2)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/readyz")
            status = connection.getresponse().status
            connection.close()
            return status == 200
        connection.close()
        return False

    def restart_apiserver(self) -> None:
        """Start the apiserver again after `apiserver.stop()`; returns when it serves."""
        self.apiserver.restart()
        self.apiserver.until("it was ready", self.ready)

    def service_account(self, namespace: str, name: str) -> Kubectl:
        """A Kubectl that has exactly the rights of an existing service account, by a real token of it."""
        token = self.kubectl("create", "token", name, "-n", namespace, "--duration=2h").strip()
        path = self.state / f"account-{namespace}-{name}.kubeconfig"
        return Kubectl(self.authority.kubeconfig(path, self.server, {"token": token}))


def credentials(kubeconfig: Path) -> list[str]:
    return [
        f"--{use}={kubeconfig}"
        for use in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    ]
