# SPDX-License-Identifier: Apache-2.0
"""The two pods of the user's story, running and sharing the node's device, and what can be asked of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from e2e.cluster.images import small
from e2e.cluster.kubectl import Kubectl, Refused, is_ready
from e2e.cluster.node import Node
from e2e.cluster.processes import wait_for
from e2e.scenarios.kubernetes import tenants

NAMESPACE = "shop"
ONLINE = {"valve.io/workload": "online"}
OFFLINE = {"valve.io/workload": "offline", "valve.io/gpu-memory": "1Gi"}
START_S = 600
ADMISSION_S = 180


class Shop:
    """Pods `serve` (vLLM, online) and `batch` (transformers, offline) in a namespace of their own."""

    def __init__(self, kubectl: Kubectl, node: Node) -> None:
        """Returns when both work."""
        self.kubectl, self.node = kubectl, node
        kubectl("create", "namespace", NAMESPACE)
        kubectl.until("the default service account", ["sa", "default", "-n", NAMESPACE], lambda _: True)
        kubectl.apply(tenants.pod(NAMESPACE, "serve", tenants.serve_command(), ONLINE))
        self.pods: dict[str, dict[str, Any]] = {}
        self.start_batch()
        self.pods["serve"] = self._running("serve")
        self.address: str = self.pods["serve"]["status"]["podIP"]
        wait_for("vLLM serves", lambda: tenants.serving(self.address), START_S)
        self.works()

    def start_batch(self) -> None:
        """The offline pod, when there is none. `works` waits for its first round. Admission may be away for a
        moment, with the node that it was drained from: then the pod is refused, and asked for again."""
        wait_for("admission", self._create_batch, ADMISSION_S)
        self.pods["batch"] = self._running("batch")

    def _create_batch(self) -> bool:
        try:
            self.kubectl.apply(tenants.pod(NAMESPACE, "batch", tenants.batch_command(), OFFLINE))
        except Refused as refused:
            if "failed calling webhook" not in refused.sentence:
                raise
            return False
        return True

    def works(self) -> None:
        wait_for("the batch's first round", lambda: bool(self.rounds()), START_S)

    def library(self, pod: str) -> str:
        """The folder of the runtime that a pod was given."""
        preload = self.kubectl("exec", pod, "-n", NAMESPACE, "--", "cat", "/etc/ld.so.preload")
        return str(Path(preload.strip()).parents[1])

    def _running(self, name: str) -> dict[str, Any]:
        return self.kubectl.until(
            f"{name} runs",
            ["pod", name, "-n", NAMESPACE],
            lambda pod: pod["status"].get("phase") == "Running",
        )

    def lines(self) -> list[dict[str, Any]]:
        """What the batch has printed."""
        text = self.kubectl("logs", "batch", "-n", NAMESPACE)
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def rounds(self) -> list[list[list[int]]]:
        """The tokens of every round that the batch has finished."""
        return [line["tokens"] for line in self.lines() if "round" in line]

    def output(self) -> list[list[int]]:
        """The tokens of a round: every one that the batch has finished has the same."""
        first, *others = self.rounds()
        assert all(tokens == first for tokens in others)
        return first

    def more_rounds(self, count: int = 1, timeout_s: float = 120) -> None:
        """Wait until the batch has finished so many more."""
        wanted = len(self.rounds()) + count
        wait_for(f"{count} more rounds", lambda: len(self.rounds()) >= wanted, timeout_s)

    def take(self, slabs: int) -> int:
        """A burst of the online pod: so many slabs, for a moment; how many it got."""
        said = self.kubectl("exec", "serve", "-n", NAMESPACE, "--", *tenants.taker_command(slabs))
        return int(said.split()[-1])

    def gpu(self) -> dict[str, Any]:
        """The device, as the node's status tells it."""
        found: dict[str, Any] = self.kubectl.get("colonode", self.node.name)["status"]["gpus"][0]
        return found

    def settle(self) -> None:
        """After the API was away: wait until the kubelet hears of changes again, which takes it up to a
        minute, and the API calls both pods Ready. An eviction before that is the cluster's own race: a
        budget that was counted from memory lets a pod go that the node controller has called not ready."""
        probe = ["pod", "probe", "-n", NAMESPACE]
        self.kubectl("run", *probe[1:], f"--image={small.BUSYBOX}", "--restart=Never", "--", "true")
        self.kubectl.until("a new pod runs", probe, lambda pod: pod["status"].get("phase") == "Succeeded")
        self.kubectl("delete", *probe)
        for name in self.pods:
            self.kubectl.until(f"{name} is Ready", ["pod", name, "-n", NAMESPACE], is_ready)

    def untouched(self) -> None:
        """Both pods are the ones that were started, never restarted."""
        for name, pod in self.pods.items():
            now = self.kubectl.get("pod", name, "-n", NAMESPACE)
            assert now["metadata"]["uid"] == pod["metadata"]["uid"], name
            assert now["status"]["phase"] == "Running", name
            assert now["status"]["containerStatuses"][0]["restartCount"] == 0, name

    def batch_cpu_s(self) -> float:
        """CPU time that the batch has used, from its cgroup."""
        uid = self.pods["batch"]["metadata"]["uid"]
        for top in (
            *Path("/sys/fs/cgroup").glob(f"*/{self.node.cgroup}"),
            Path("/sys/fs/cgroup", self.node.cgroup),
        ):
            for found in top.rglob(f"pod{uid}/cpuacct.usage"):
                return int(found.read_text()) / 1e9
            for found in top.rglob(f"pod{uid}/cpu.stat"):
                usage = [line for line in found.read_text().splitlines() if line.startswith("usage_usec")]
                if usage:
                    return int(usage[0].split()[1]) / 1e6
        raise AssertionError(f"no cgroup of pod {uid}")
