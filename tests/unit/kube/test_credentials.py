# SPDX-License-Identifier: Apache-2.0
"""Ways to a cluster, and the sentences when there is none."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from valve_agent.kube import credentials
from valve_agent.kube.credentials import CredentialsError, from_kubeconfig, in_cluster


def write(path: Path, user: dict[str, Any] | None = None, **cluster: Any) -> Path:
    document = {
        "current-context": "here",
        "contexts": [
            {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
            {"name": "lost", "context": {"cluster": "gone", "user": "u"}},
        ],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1", **cluster}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_token(tmp_path: Path) -> None:
    server = from_kubeconfig(write(tmp_path / "config", {"token": "secret"}))
    assert (server.url, server.token(), server.namespace) == ("http://127.0.0.1:1", "secret", "team")


def test_a_token_file_beside_the_kubeconfig_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "TOKEN_REREAD_S", 0.0)
    (tmp_path / "token").write_text("one\n")
    server = from_kubeconfig(write(tmp_path / "config", {"tokenFile": "token"}))
    assert server.token() == "one"
    (tmp_path / "token").write_text("two\n")
    assert server.token() == "two"


def test_an_exec_plugin(tmp_path: Path) -> None:
    script = tmp_path / "plugin"
    script.write_text('#!/bin/sh\necho "{\\"status\\": {\\"token\\": \\"$WHO-$1\\"}}"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    plugin = {"command": str(script), "args": ["x"], "env": [{"name": "WHO", "value": "me"}]}
    assert from_kubeconfig(write(tmp_path / "config", {"exec": plugin})).token() == "me-x"


@pytest.mark.parametrize(
    ("why", "user", "cluster", "context", "sentence"),
    [
        ("another context", {}, {}, "nowhere", "there is no context 'nowhere'; it has: here, lost"),
        ("a context without its cluster", {}, {}, "lost", "there is no cluster 'gone'"),
        ("a proxy", {}, {"proxy-url": "http://p"}, None, "proxy-url is not supported"),
        ("no server", {}, {"server": ""}, None, "has no server URL"),
        ("bad base64", {"client-certificate-data": "%%%"}, {}, None, "client-certificate-data is not base64"),
        (
            "no certificate",
            {},
            {"server": "https://x", "certificate-authority": "none.crt"},
            None,
            "certificates cannot be used",
        ),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path,
    why: str,
    user: dict[str, Any],
    cluster: dict[str, Any],
    context: str | None,
    sentence: str,
) -> None:
    with pytest.raises(CredentialsError, match=sentence):
        from_kubeconfig(write(tmp_path / "config", user, **cluster), context)


def test_an_exec_plugin_that_fails_is_named(tmp_path: Path) -> None:
    plugin = {"command": str(tmp_path / "none"), "installHint": "Install it from your cloud."}
    server = from_kubeconfig(write(tmp_path / "config", {"client-certificate": "x", "exec": plugin,
                                                         "client-key": "y"}))  # fmt: skip
    with pytest.raises(CredentialsError, match=r"none gave no credential.*Install it from your cloud"):
        server.token()


def test_a_pod(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("valve-system")
    environ = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    with pytest.raises(CredentialsError, match="certificates cannot be used"):
        in_cluster(environ, tmp_path)
    with pytest.raises(CredentialsError, match="give --kubeconfig FILE"):
        in_cluster({}, tmp_path)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"KUBECONFIG": "/a:/b", "HOME": "/none"}, Path("/a")),
        ({"HOME": "/none"}, None),
    ],
)
def test_where_a_kubeconfig_is_looked_for(environ: dict[str, str], expected: Path | None) -> None:
    assert credentials.default_kubeconfig(environ) == expected
