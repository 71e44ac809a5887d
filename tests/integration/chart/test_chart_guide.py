# SPDX-License-Identifier: Apache-2.0
"""docs/install.md, run: every command of the guide, in its order, in a shell.

Gap: no pod can run here, so `helm test` is left to e2e, and the webhook that judges policies is taken away
once it is installed: nobody would answer it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helm_chart import NAMESPACE, ROOT, uninstall

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.programs import kube, program

GUIDE = ROOT / "docs/install.md"
NEEDS_PODS = ("helm test",)


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.fixture
def shell(bare_plane: ControlPlane, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user whose helm and kubectl are those under test."""
    for name, words in (("helm", [str(program("helm"))]), ("kubectl", kube("kubectl"))):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    yield {"PATH": path, "KUBECONFIG": str(bare_plane.kubeconfig), "HOME": str(tmp_path)}
    for example in ("online", "offline"):
        path = ROOT / f"examples/{example}.yaml"
        bare_plane.kubectl("delete", "-f", path, "--ignore-not-found", "--wait=false")
    uninstall(bare_plane)


def test_the_guide_has_the_whole_life_of_a_release() -> None:
    text = "\n".join(commands())
    for command in (
        "helm install",
        "helm test",
        "helm upgrade",
        "helm uninstall",
        "kubectl apply",
        "kubectl delete crd",
    ):
        assert command in text


def test_every_command_of_the_guide_works(bare_plane: ControlPlane, shell: dict[str, str]) -> None:
    for command in commands():
        if command.startswith(NEEDS_PODS):
            continue
        done = subprocess.run(
            ["sh", "-c", command],
            env=shell,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command.startswith("helm install"):
            bare_plane.kubectl("delete", "validatingwebhookconfiguration", "valve")
            bare_plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        if command.startswith("kubectl get colo"):
            assert "inference" in done.stdout
    left = bare_plane.kubectl("get", "crd,all", "-n", NAMESPACE, "-o", "name")
    assert "valve" not in left
