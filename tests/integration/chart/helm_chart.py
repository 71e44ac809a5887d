# SPDX-License-Identifier: Apache-2.0
"""The chart as a user has it: the helm program on charts/valve, and what comes out as objects.

Why it exists: every test of this folder renders, installs or reads the chart. Functions without state, one
helm process per call. Callers: the tests beside it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.programs import program

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts/valve"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
NAMESPACE = "valve-system"
RELEASE = "valve"
TIMEOUT_S = 120

Object = dict[str, Any]


class HelmFailed(Exception):
    """helm ended with an error; the message is what it printed."""


def helm(*arguments: str | Path, kubeconfig: Path | None = None) -> str:
    """Run `helm ARGUMENTS`; its output. Raises HelmFailed, MissingError."""
    words = [str(argument) for argument in arguments]
    access = [] if kubeconfig is None else [f"--kubeconfig={kubeconfig}"]
    done = subprocess.run(
        [program("helm"), *words, *access], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    if done.returncode:
        raise HelmFailed(done.stderr.strip() + done.stdout.strip())
    return done.stdout


def settings(values: Sequence[str], files: Sequence[Path] = ()) -> list[str]:
    """Flags for values: `a.b=c` by --set-json where c is JSON, else by --set."""
    return [f"--values={path}" for path in files] + [f"--set-json={value}" for value in values]


def render(*values: str, files: Sequence[Path] = (), name: str = RELEASE) -> list[Object]:
    """Every object of `helm template`, hooks included."""
    text = helm("template", name, CHART, f"--namespace={NAMESPACE}", *settings(values, files))
    return [document for document in yaml.safe_load_all(text) if document]


def find(objects: Sequence[Object], kind: str, name: str | None = None) -> Object:
    found = [
        entry for entry in objects if entry["kind"] == kind and name in (None, entry["metadata"]["name"])
    ]
    assert len(found) == 1, f"{len(found)} objects of kind {kind} named {name}"
    return found[0]


def node_templates(objects: Sequence[Object]) -> dict[str, Object]:
    """The DaemonSets that the operator gets, by file name."""
    config = next(
        entry for entry in objects if entry["kind"] == "ConfigMap" and "agent.yaml" in entry.get("data", {})
    )
    return {name: yaml.safe_load(text) for name, text in config["data"].items()}


def workloads(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """(what, pod spec) of everything that runs: the operator, the test, and the node templates."""
    for entry in objects:
        if entry["kind"] == "Deployment":
            yield entry["metadata"]["name"], entry["spec"]["template"]["spec"]
        elif entry["kind"] == "Pod":
            yield entry["metadata"]["name"], entry["spec"]
    for entry in node_templates(objects).values():
        yield entry["metadata"]["name"], entry["spec"]["template"]["spec"]


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def install(plane: ControlPlane, *arguments: str | Path, chart: Path = CHART) -> str:
    """`helm install valve charts/valve -n valve-system --create-namespace ARGUMENTS`."""
    return helm(
        "install", RELEASE, chart, "-n", NAMESPACE, "--create-namespace", *arguments,
        kubeconfig=plane.kubeconfig,
    )  # fmt: skip


def uninstall(plane: ControlPlane) -> str:
    """The release, if there is one, and the CRDs that it keeps."""
    output = helm(
        "uninstall", RELEASE, "-n", NAMESPACE, "--wait", "--ignore-not-found", kubeconfig=plane.kubeconfig
    )
    chosen = ["-l", "app.kubernetes.io/part-of=valve"]
    found = plane.kubectl.items("crd", *chosen)
    for crd in found:
        _touch(plane, crd)
    if found:
        plane.kubectl("delete", "crd", *chosen, timeout_s=180)
    return output


def _touch(plane: ControlPlane, crd: Object) -> None:
    """Have the API server make the CRD's storage, which it does at the first request. If that is the
    deletion's own, the deletion fails once and is tried again; by the name's twentieth failure, which in one
    API server are counted over all CRDs of that name, minutes later (seen with 1.36)."""
    spec = crd["spec"]
    plane.kubectl("wait", "--for=condition=Established", f"crd/{crd['metadata']['name']}", "--timeout=30s")
    for version in spec["versions"]:
        plane.kubectl("get", "--raw", f"/apis/{spec['group']}/{version['name']}/{spec['names']['plural']}")
