# SPDX-License-Identifier: Apache-2.0
"""The cluster's certificates: one CA, and leaves signed by it, all made by `openssl` (3.0 or newer).

Keys are P-256 because RSA keys would cost more time than the whole control plane needs to start. Everything
lives in one folder of the cluster's state and is valid for two days.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.errors import BuildError, MissingError

CONFIG = "[req]\ndistinguished_name=dn\nprompt=no\n[dn]\n"
CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, both PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        """Raises MissingError without openssl."""
        if shutil.which("openssl") is None:
            raise MissingError("the test cluster needs openssl (Debian, Ubuntu: apt-get install openssl)")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        (folder / "openssl.cnf").write_text(CONFIG)
        self.ca = self._request("ca", "/CN=valve-test-ca", [
            "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
            "subjectKeyIdentifier=hash",
        ])  # fmt: skip
        self.service_accounts = self.leaf("service-accounts", "service-accounts")
        """Signs service account tokens; the apiserver reads the public key from its certificate."""

    def leaf(
        self, name: str, common_name: str, *, groups: Sequence[str] = (), sans: Sequence[str] = ()
    ) -> Pair:
        """A certificate for a client (user `common_name`, groups as organisations) or a server (`sans`)."""
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={common_name}"
        extensions = ["basicConstraints=critical,CA:FALSE", "extendedKeyUsage=serverAuth,clientAuth"]
        if sans:
            extensions.append("subjectAltName=" + ",".join(sans))
        return self._request(name, subject, extensions, "-CA", self.ca.certificate, "-CAkey", self.ca.key)

    def _request(self, name: str, subject: str, extensions: list[str], *signer: str | Path) -> Pair:
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        added = [word for extension in extensions for word in ("-addext", extension)]
        self._openssl(
            "req", "-x509", "-config", self.folder / "openssl.cnf", *CURVE, "-days", "2", "-subj", subject,
            *signer, *added, "-keyout", pair.key, "-out", pair.certificate,
        )  # fmt: skip
        return pair

    def _openssl(self, *arguments: str | Path) -> None:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"openssl (3.0 or newer is needed) could not make a certificate:\n{done.stderr}")

    def kubeconfig(self, path: Path, server: str, user: dict[str, str]) -> Path:
        """A kubeconfig (JSON is YAML) for a user given as kubeconfig's own `user` fields."""
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "valve",
            "clusters": [{"name": "valve", "cluster": {
                "server": server, "certificate-authority": str(self.ca.certificate)}}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": "valve", "context": {"cluster": "valve", "user": "user"}}],
        }))  # fmt: skip
        path.chmod(0o600)
        return path

    def client_kubeconfig(self, path: Path, server: str, pair: Pair) -> Path:
        user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
        return self.kubeconfig(path, server, user)
