# SPDX-License-Identifier: Apache-2.0
"""Talks to any cluster as a user does: kubectl with a kubeconfig.

The scenarios know a cluster only through this class, so that they run on kind or a real cluster too.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.cluster.errors import ClusterError
from e2e.cluster.programs import kube

Object = dict[str, Any]
"""A Kubernetes object, or a List of them, as JSON."""
POLL_S = 0.1


class Refused(ClusterError):
    """kubectl ended with an error; `sentence` is what it printed, which is what a user reads."""

    def __init__(self, command: Sequence[str], sentence: str) -> None:
        super().__init__(f"kubectl {' '.join(command)}: {sentence}")
        self.sentence = sentence


def is_ready(found: Mapping[str, Any]) -> bool:
    """Whether an object's condition Ready is True: a Node's, a Pod's, a ColocationPolicy's."""
    conditions = found["status"].get("conditions", [])
    return {condition["type"]: condition["status"] for condition in conditions}.get("Ready") == "True"


class Kubectl:
    """One kubeconfig. Safe from several threads: every call is a process of its own."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig

    def __call__(self, *arguments: str | Path, stdin: str = "", timeout_s: float = 60) -> str:
        """Run `kubectl ARGUMENTS` and return its output. Raises Refused when it fails."""
        words = [str(argument) for argument in arguments]
        done = subprocess.run(
            [*kube("kubectl"), f"--kubeconfig={self.kubeconfig}", *words],
            input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s,
        )  # fmt: skip
        if done.returncode:
            raise Refused(words, done.stderr.strip())
        return done.stdout

    def apply(self, *manifests: Path | Object | str) -> str:
        """Apply files, folders, objects, or YAML text."""
        output = ""
        for manifest in manifests:
            if isinstance(manifest, Path):
                output += self("apply", "-f", manifest)
            else:
                text = manifest if isinstance(manifest, str) else json.dumps(manifest)
                output += self("apply", "-f", "-", stdin=text)
        return output

    def get(self, *arguments: str) -> Object:
        found: Object = json.loads(self("get", *arguments, "-o", "json"))
        return found

    def items(self, *arguments: str) -> list[Object]:
        found: list[Object] = self.get(*arguments)["items"]
        return found

    def until(
        self, what: str, arguments: Sequence[str], ready: Callable[[Object], bool], timeout_s: float = 120
    ) -> Object:
        """Poll `get ARGUMENTS` until `ready(object)`; an object that does not exist yet is not ready.

        Raises ClusterError with the last state seen.
        """
        deadline = time.monotonic() + timeout_s
        seen = ""
        while True:
            try:
                found = self.get(*arguments)
                seen = json.dumps(found.get("status", found))[:2000]
                if ready(found):
                    return found
            except Refused as refused:
                seen = refused.sentence
            if time.monotonic() > deadline:
                raise ClusterError(f"{what} did not happen within {timeout_s:.0f} s; last seen: {seen}")
            time.sleep(POLL_S)
