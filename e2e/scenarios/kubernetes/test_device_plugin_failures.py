# SPDX-License-Identifier: Apache-2.0
"""Kubernetes' own node tests of device plugins, put to ours: failures.

After test/e2e_node/device_plugin_failures_test.go of Kubernetes v1.36 (seven scenarios; each test's
docstring is the scenario's title there). There a broken sample plugin shows that the kubelet gives up on it
and never asks again; here ours is broken in the same place and must come back by itself. Gap: the kubelet
forgets a silent plugin's capacity after five minutes; no test waits for that.
"""

from __future__ import annotations

import signal
import time

from e2e.cluster.processes import wait_for
from e2e.scenarios.kubernetes.plugin_rig import GPUS, MEMORY_GIB, TOTAL, PluginRig
from valve_kubelet import calls
from valve_kubelet import deviceplugin_pb2 as dp

PLUGINS = "/var/lib/kubelet/device-plugins"


def test_options_fail(rig: PluginRig) -> None:
    """when GetDevicePluginOptions fails, device plugin will not be used."""
    rig.stop_plugin()
    rig.restart_kubelet()
    rig.kubectl.until("nothing to allocate", ["node", rig.node.name], lambda node: not _allocatable(node))
    (broken := rig.node.path(PLUGINS) / "valve-offline.sock").unlink(missing_ok=True)
    with calls.channel(rig.node.path(PLUGINS) / calls.KUBELET_SOCKET) as channel:
        # the kubelet connects to a socket that nobody serves, and refuses the registration
        request = dp.RegisterRequest(
            version=calls.VERSION, endpoint=broken.name, resource_name="valve.test/broken"
        )
        error = calls.REGISTER.call(channel).future(request, timeout=30).exception()
    assert error
    assert "valve.test/broken" not in rig.kubectl.get("node", rig.node.name)["status"]["capacity"]
    rig.start_plugin()
    rig.until_offline(TOTAL, TOTAL)


def test_unhealthy_and_back(rig: PluginRig) -> None:
    """will set allocatable to zero when a single device became unhealthy and then back to 1 ..."""
    rig.agent.lendable_gib = {GPUS[0]: 1, GPUS[1]: 0}
    rig.until_offline(1, TOTAL)
    rig.agent.lendable_gib = dict.fromkeys(GPUS, 0)
    rig.until_offline(0, TOTAL)
    rig.agent.lendable_gib = {GPUS[0]: 1, GPUS[1]: 0}
    rig.until_offline(1, TOTAL)


def test_unhealthy_under_a_pod(rig: PluginRig, namespace: str) -> None:
    """will set allocatable to zero when a single device became unhealthy, but capacity will stay at 1.

    Ours keeps what a container holds Healthy: the kubelet would not admit the pod again after a restart.
    """
    rig.start(namespace, "one", gib=3)
    rig.until_phase(namespace, "one", "Running")
    rig.agent.lendable_gib = dict.fromkeys(GPUS, 0)
    rig.until_offline(3, TOTAL)
    time.sleep(3)
    rig.until_phase(namespace, "one", "Running", timeout_s=1)
    assert rig.restarts(namespace, "one") == 0
    rig.restart_kubelet()
    rig.until_offline(3, TOTAL)
    rig.until_phase(namespace, "one", "Running", timeout_s=1)
    rig.delete(namespace, ["one"])
    rig.until_offline(0, TOTAL)


def test_lowered_and_back(rig: PluginRig) -> None:
    """will lower allocatable to a number of unhealthy devices and then back if they became healthy again."""
    for first, second in ((8, 7), (8, 8), (7, 7), (7, 8), (8, 8)):
        rig.agent.lendable_gib = {GPUS[0]: first, GPUS[1]: second}
        rig.until_offline(first + second, TOTAL)


def test_list_fails_immediately(rig: PluginRig) -> None:
    """when ListAndWatch fails immediately, node allocatable will be set to zero ..."""
    rig.stop_plugin()
    rig.restart_kubelet()
    rig.start_plugin()
    sock = rig.node.path(PLUGINS) / "valve-offline.sock"
    wait_for("the plugin's socket", sock.exists, 60)
    rig.plugin.signal(signal.SIGKILL)  # between Register and the first list, or soon after
    rig.plugin.wait(10)
    rig.kubectl.until("nothing to allocate", ["node", rig.node.name], lambda node: not _allocatable(node))
    rig.start_plugin()
    rig.until_offline(TOTAL, TOTAL)


def test_list_fails_later(rig: PluginRig, namespace: str) -> None:
    """when ListAndWatch fails after provisioning devices, node allocatable will be set to zero ..."""
    rig.start(namespace, "one")
    rig.until_phase(namespace, "one", "Running")
    held = rig.devices(namespace, "one")
    rig.plugin.kill()
    rig.until_offline(0, TOTAL)
    assert rig.restarts(namespace, "one") == 0
    rig.start_plugin()
    rig.until_offline(TOTAL, TOTAL)
    rig.until_devices(namespace, "one", held)


def test_socket_lost(rig: PluginRig) -> None:
    """As before, but the plugin lives and only its socket is gone (no scenario there): it registers again."""
    sock = rig.node.path(PLUGINS) / "valve-offline.sock"
    old = sock.stat().st_ctime_ns  # its inode number may come back
    sock.unlink()
    wait_for("a new socket", lambda: sock.exists() and sock.stat().st_ctime_ns != old, 60)
    rig.until_offline(MEMORY_GIB * len(GPUS), TOTAL)
    assert rig.plugin.returncode() is None


def test_plugin_stops(rig: PluginRig) -> None:
    """when device plugin is stopped after provisioning devices, node allocatable will be set to zero."""
    rig.stop_plugin()
    rig.until_offline(0, TOTAL)
    rig.start_plugin()
    rig.until_offline(TOTAL, TOTAL)


def _allocatable(node: dict[str, dict[str, dict[str, str]]]) -> int:
    return int(node["status"]["allocatable"].get("valve.io/offline-memory-gib", 0))
