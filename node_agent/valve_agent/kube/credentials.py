# SPDX-License-Identifier: Apache-2.0
"""How to reach a cluster: the service account that every pod has, or a kubeconfig.

Why it exists: the agent runs in a pod, people run `kubectl valve` with what kubectl uses; both must work
without the official client. Of kubeconfig: certificate authority, client certificate, token, token file and
exec plugins (what clouds use), as files or inline. Not: passwords (gone from Kubernetes) and proxy-url.

Threading model: called once at start; the token function it returns may be called by any thread. Callers:
kube/node.py, valve_cli.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from valve_agent.kube.api import KubeError, Server

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_REREAD_S = 60.0
"""The kubelet renews a mounted token long before it ends."""
EXEC_TIMEOUT_S = 60.0


class CredentialsError(KubeError):
    """The message says which file and field."""


def in_cluster(environ: Mapping[str, str], folder: Path = SERVICE_ACCOUNT) -> Server:
    """From a pod's service account. Raises CredentialsError."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (folder / "token").exists():
        raise CredentialsError("this is no pod with a service account: give --kubeconfig FILE")
    host = f"[{host}]" if ":" in host else host
    try:
        namespace = (folder / "namespace").read_text().strip()
    except OSError:
        namespace = "default"
    context = _context(str(folder / "ca.crt"), None)
    return Server(f"https://{host}:{port}", context, _token_file(folder / "token"), namespace)


def default_kubeconfig(environ: Mapping[str, str]) -> Path | None:
    """Where kubectl would look: the first of KUBECONFIG, else ~/.kube/config; None if there is none."""
    named = [entry for entry in environ.get("KUBECONFIG", "").split(os.pathsep) if entry]
    path = Path(named[0]) if named else Path(environ.get("HOME", "/")) / ".kube" / "config"
    return path if named or path.exists() else None


def from_kubeconfig(
    path: Path, context: str | None = None, environ: Mapping[str, str] | None = None
) -> Server:
    """The cluster and user of `context` (None: the current one). `environ`: what an exec plugin inherits.
    Raises CredentialsError."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CredentialsError(f"{path} cannot be read as a kubeconfig: {error}") from error
    if not isinstance(document, dict):
        raise CredentialsError(f"{path} is no kubeconfig")
    name = context or document.get("current-context")
    chosen = _named(document, "contexts", name, "context", path)
    cluster = _named(document, "clusters", chosen.get("cluster"), "cluster", path)
    user = _named(document, "users", chosen.get("user"), "user", path) if chosen.get("user") else {}
    if cluster.get("proxy-url"):
        raise CredentialsError(f"{path}: proxy-url is not supported; use a context without one")
    url = str(cluster.get("server", ""))
    if not url.startswith(("https://", "http://")):
        raise CredentialsError(f"{path}: cluster {chosen.get('cluster')} has no server URL")
    token, certificate = _identity(user, path, environ or {})
    ssl_context = None
    if url.startswith("https://"):
        ssl_context = _context(
            _file(cluster, "certificate-authority", path), certificate,
            verify=not cluster.get("insecure-skip-tls-verify"),
        )  # fmt: skip
    return Server(url.rstrip("/"), ssl_context, token, chosen.get("namespace") or "default")


def _identity(
    user: Mapping[str, Any], path: Path, environ: Mapping[str, str]
) -> tuple[Callable[[], str | None], tuple[str, str] | None]:
    certificate = _file(user, "client-certificate", path)
    key = _file(user, "client-key", path)
    pair = (certificate, key) if certificate and key else None
    if user.get("tokenFile"):
        return _token_file(path.parent / user["tokenFile"]), pair
    if user.get("token"):
        fixed = str(user["token"])
        return (lambda: fixed), pair
    if user.get("exec"):
        plugin = _ExecPlugin(user["exec"], path, environ)
        return plugin.token, pair or plugin.certificate()
    return (lambda: None), pair


class _ExecPlugin:
    """client.authentication.k8s.io: a program that prints a token or a certificate."""

    def __init__(self, spec: Mapping[str, Any], path: Path, environ: Mapping[str, str]) -> None:
        self._spec, self._path = spec, path
        extra = {str(entry["name"]): str(entry["value"]) for entry in spec.get("env") or []}
        info = {
            "apiVersion": spec.get("apiVersion"),
            "kind": "ExecCredential",
            "spec": {"interactive": False},
        }
        self._environ = {**environ, **extra, "KUBERNETES_EXEC_INFO": json.dumps(info)}
        self._lock = threading.Lock()
        self._status: dict[str, Any] = {}
        self._asked = 0.0

    def token(self) -> str | None:
        with self._lock:
            if not self._status or time.monotonic() - self._asked > TOKEN_REREAD_S:
                self._status = self._ask()
                self._asked = time.monotonic()
            return self._status.get("token")

    def certificate(self) -> tuple[str, str] | None:
        self.token()
        data, key = self._status.get("clientCertificateData"), self._status.get("clientKeyData")
        return (_in_memory(data.encode()), _in_memory(key.encode())) if data and key else None

    def _ask(self) -> dict[str, Any]:
        command = [str(self._spec["command"]), *map(str, self._spec.get("args") or [])]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=EXEC_TIMEOUT_S, env=self._environ
            )
            if done.returncode:
                raise CredentialsError(f"{self._path}: {command[0]} failed: {done.stderr.strip()[-500:]}")
            status = json.loads(done.stdout)["status"]
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
            hint = self._spec.get("installHint", "")
            raise CredentialsError(
                f"{self._path}: {command[0]} gave no credential: {error}. {hint}".rstrip()
            ) from error
        assert isinstance(status, dict)
        return status


def _named(document: Mapping[str, Any], part: str, name: object, what: str, path: Path) -> dict[str, Any]:
    entries = document.get(part) or []
    for entry in entries:
        if isinstance(entry, dict) and entry.get("name") == name:
            inner = entry.get(what)
            return inner if isinstance(inner, dict) else {}
    known = ", ".join(str(entry.get("name")) for entry in entries if isinstance(entry, dict)) or "none"
    raise CredentialsError(f"{path}: there is no {what} {name!r}; it has: {known}")


def _file(entry: Mapping[str, Any], field: str, path: Path) -> str | None:
    """A file's name, of a file that is named or whose contents are given."""
    data = entry.get(f"{field}-data")
    if data:
        try:
            return _in_memory(base64.b64decode("".join(str(data).split()), validate=True))
        except ValueError as error:
            raise CredentialsError(f"{path}: {field}-data is not base64") from error
    named = entry.get(field)
    return str(path.parent / str(named)) if named else None


def _in_memory(data: bytes) -> str:
    """ssl reads certificates from files only: one that is on no disk, and lives as long as the process."""
    fd = os.memfd_create("valve-credential", os.MFD_CLOEXEC)
    os.write(fd, data)
    return f"/proc/self/fd/{fd}"


def _context(authority: str | None, pair: tuple[str, str] | None, verify: bool = True) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=authority)
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if pair is not None:
            context.load_cert_chain(*pair)
    except (OSError, ssl.SSLError) as error:
        raise CredentialsError(f"certificates cannot be used: {error}") from error
    return context


def _token_file(path: Path) -> Callable[[], str | None]:
    lock = threading.Lock()
    known = ""
    read_at = 0.0

    def token() -> str:
        nonlocal known, read_at
        with lock:
            if not known or time.monotonic() - read_at > TOKEN_REREAD_S:
                try:
                    known = path.read_text().strip()
                except OSError as error:
                    if not known:
                        raise CredentialsError(f"the token {path} cannot be read: {error}") from error
                read_at = time.monotonic()
            return known

    return token
