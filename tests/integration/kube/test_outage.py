# SPDX-License-Identifier: Apache-2.0
"""The API server goes away for more than a minute: nobody on the node notices."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from node_live import SLAB, NodeAgent, PodTenant, colocation_node, condition, wait_status

from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.errors import MissingError
from valve_cli.bench.rig import wait_for

AWAY_S = 62
ROOT = Path(__file__).resolve().parents[3]


def test_tenants_go_on_while_the_api_server_is_away(tmp_path: Path, pod: Callable[..., PodTenant]) -> None:
    """It is stopped, not killed: connections stand and are silent, which is the harder case."""
    try:
        plane = ControlPlane()
    except MissingError as error:
        pytest.skip(str(error))
    with plane:
        plane.kubectl.apply(ROOT / "crds" / "valve.io_colocationnodes.yaml")
        plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        plane.kubectl.apply(colocation_node("away"))
        with NodeAgent(tmp_path, "away", plane.kubeconfig) as agent:
            agent.start()
            offline, online = pod(agent, "offline", "batch", "job"), pod(agent, "online", "serve", "chat")
            for tenant in (offline, online):
                assert tenant.ask("attach", timeout_ms=15_000)["attached"]
                tenant.ask("arena", slabs=30, slab_bytes=SLAB)
            plane.apiserver.signal(signal.SIGSTOP)
            went = time.monotonic()
            try:
                late = pod(agent, "offline", "batch", "late")
                assert late.ask("attach", timeout_ms=15_000)["attached"], "a new pod comes in"
                requests = 0
                while time.monotonic() - went < AWAY_S:
                    online.ask("busy")
                    assert len(online.ask("take", slabs=20)["held"]) >= 20
                    online.ask("idle")
                    online.ask("want", slabs=0)
                    online.ask("return", slabs=list(range(30)))
                    offline.ask("want", slabs=30)
                    wait_for("offline to run and to grow", lambda: offline.ask("poll")["held"])
                    requests += 1
                    time.sleep(1)
                assert requests > 10
                assert agent.status()["cluster"]["api_error"], "and it knows that it hears nothing"
            finally:
                plane.apiserver.signal(signal.SIGCONT)
            plane.kubectl.apply(colocation_node("away", memory={"slabSize": "2Mi", "onlineFloor": "50%"}))
            agent.wait_event("settings")
            wait_status(
                plane.kubectl, "away", "the status to be written again",
                lambda status: condition(status, "Ready").get("observedGeneration") == 2,
            )  # fmt: skip
            assert agent.events("kill") == []
