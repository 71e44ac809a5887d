# SPDX-License-Identifier: Apache-2.0
"""1,007 nodes of 8 GPUs: one change of a policy reaches all, in bounded memory, and then there is silence.

Objects only, no kubelets, and no controllers that would change the nodes. Run with `-s` for the figures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from operator_rig import Installed, eventually

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.errors import MissingError
from valve_api.names import API_VERSION
from valve_operator.api import COLONODES, Api, configuration

NODES = 1007
GPUS = 8
RSS_LIMIT_MIB = 200
AT_REST_S = 30


@pytest.fixture
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    try:
        plane = ControlPlane()
    except MissingError as error:
        pytest.skip(str(error))
    with plane:
        installed = Installed(plane, tmp_path_factory.mktemp("scale"))
        ready = [{"type": "Ready", "status": "True", "reason": "Test", "message": ""}]
        names = [f"registry.example.com/team-{number}/image@sha256:{'0' * 64}" for number in range(40)]
        images = [{"names": [name], "sizeBytes": 1 << 30} for name in names]
        nodes = [
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": f"n{number:04}", "labels": {"gpu": "yes"}},
                "status": {"conditions": ready, "images": images},
            }
            for number in range(NODES)
        ]
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": nodes})
        installed.kubectl("create", "-f", "-", stdin=text, timeout_s=300)
        yield installed


def generations(installed: Installed) -> list[int]:
    path = "jsonpath={.items[*].spec.policy.generation}"
    return [int(word) for word in installed.kubectl("get", "colonode", "-o", path).split()]


def report_all(installed: Installed) -> None:
    """Every agent reports eight GPUs."""
    gpu = {"preemptLatency": {"p50Us": 100, "p99Us": 400, "maxUs": 900, "samples": 1000}, "memory": "141Gi"}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {"type": "Ready", "status": "True", "reason": "Follows", "lastTransitionTime": now}
    status = {
        "observedGeneration": 1,
        "conditions": [ready],
        "gpus": [{"id": f"GPU-{number}", **gpu} for number in range(GPUS)],
    }
    names = installed.kubectl("get", "colonode", "-o", "jsonpath={.items[*].metadata.name}").split()
    asyncio.run(_report(installed, names, status))


async def _report(installed: Installed, names: list[str], status: dict[str, Any]) -> None:
    """Not by kubectl, which takes a fifth of a second for each."""
    api = Api(await configuration(installed.kubectl.kubeconfig))
    slots = asyncio.Semaphore(16)

    async def report(name: str) -> None:
        body = {
            "apiVersion": API_VERSION,
            "kind": "ColocationNode",
            "metadata": {"name": name},
            "status": status,
        }
        async with slots:
            await api.apply(COLONODES, body, "status")

    try:
        await asyncio.gather(*(report(name) for name in names))
    finally:
        await api.close()


def cpu_seconds(installed: Installed) -> dict[str, float]:
    """CPU time so far of the operator and of what it talks to."""
    found = dict.fromkeys(("valve_operator", "kube-apiserver", "etcd"), 0.0)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        words = process.info["cmdline"] or []
        ours = any(str(installed.plane.state) in word or str(installed.folder) in word for word in words)
        for name in found:
            if ours and name in words:
                found[name] += process.info["cpu_times"].user + process.info["cpu_times"].system
    return found


RUNS = "valve_operator_reconciles_total"
SLOWEST = "valve_operator_slowest_reconcile_seconds"
DONE = 'valve_operator_actions_total{outcome="done"}'


@pytest.mark.timeout(540)
def test_a_thousand_nodes(large: Installed) -> None:
    with large.replica("a") as operator:

        def until_written(lease: str) -> float:
            """Seconds from a change of the policy until every node's settings are written."""
            before = operator.metrics()[DONE]
            begun_s = time.monotonic()
            large.policy("fleet", nodeSelector={"gpu": "yes"}, compute={"lease": lease})
            eventually("every write", lambda: operator.metrics()[DONE] - before >= NODES, 300)
            return time.monotonic() - begun_s

        first_s = until_written("500ms")
        eventually("settings everywhere", lambda: generations(large) == [1] * NODES, 300)
        report_all(large)
        ready = eventually(
            "every node follows",
            lambda: (c := large.condition("fleet", "Ready")).get("status") == "True" and c,
            300,
        )
        assert ready["message"] == f"all {NODES} nodes follow the policy"
        assert large.kubectl.get("colo", "fleet")["status"]["gpus"] == NODES * GPUS

        cpu = cpu_seconds(large)
        change_s = until_written("1s")
        used = {name: seconds - cpu[name] for name, seconds in cpu_seconds(large).items()}
        eventually("the change everywhere", lambda: generations(large) == [2] * NODES, 60)

        counts: list[float] = []

        def still() -> bool:
            """Nothing was done for the last fifty looks: five seconds and more."""
            counts.append(operator.metrics()[DONE])
            return len(counts) >= 50 and len(set(counts[-50:])) == 1

        eventually("nothing is missing", still, 120)
        requests, runs = operator.requests(), operator.metrics()[RUNS]
        time.sleep(AT_REST_S)
        rest = operator.metrics()
        rate = (operator.requests() - requests) / AT_REST_S
        print(
            f"\n{NODES} nodes x {GPUS} GPUs (objects only): first settings {first_s:.1f}s, "
            f"one change {change_s:.1f}s, operator {operator.rss_mib:.0f} MiB; "
            f"CPU of the change: {', '.join(f'{k} {v:.1f}s' for k, v in used.items())}; "
            f"at rest {rate:.2f} requests/s, "
            f"{(rest[RUNS] - runs) / AT_REST_S:.2f} reconciles/s; "
            f"slowest reconcile {rest[SLOWEST] * 1000:.0f} ms"
        )
        assert rest[DONE] == counts[-1], "no writes at rest"
        assert rate < 1, "at rest only the Lease is renewed and our DaemonSets are looked at"
        assert operator.rss_mib < RSS_LIMIT_MIB
