# SPDX-License-Identifier: Apache-2.0
"""The plugin as a program: CDI files, metrics and health, arguments, a large request."""

from __future__ import annotations

import json
import os
import re
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest
from device_node import GPU_A, FakeAgent, Plugin, free_port, get
from fake_kubelet import FakeKubelet

from valve_deviceplugin.main import main
from valve_kubelet import calls
from valve_kubelet import deviceplugin_pb2 as dp

ONLINE, OFFLINE = "valve.io/online-gpu", "valve.io/offline-memory-gib"
Until = Callable[[Callable[[], bool], str], None]


def test_cdi_devices_are_named_and_their_specs_are_there(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin, folder: Path
) -> None:
    """Also of the version before, while a container may be started with it again: specs live on a tmpfs."""
    cdi = folder / "cdi"
    options = ("--injection", "cdi", "--cdi-dir", str(cdi))
    plugin.start(*options)
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 28, "units")
    answer = kubelet.admit("a", {OFFLINE: 3}).answers[OFFLINE]
    assert [device.name for device in answer.cdi_devices] == ["valve.io/runtime=0.1.0-offline"]
    assert not answer.mounts
    assert dict(answer.envs) == {
        "VALVE_GPU": GPU_A, "VALVE_MEMORY_GIB": "3", "NVIDIA_VISIBLE_DEVICES": GPU_A,
    }  # fmt: skip
    plugin.stop()
    for path in cdi.iterdir():  # a reboot
        path.unlink()
    plugin.start(*options, "--library", "/opt/valve/0.2.0")
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 28, "units")
    again = kubelet.admit("b", {OFFLINE: 3}).answers[OFFLINE]
    assert [device.name for device in again.cdi_devices] == ["valve.io/runtime=0.2.0-offline"]
    names = {
        f"{spec['kind']}={device['name']}"
        for path in cdi.glob("*.json")
        for spec in [json.loads(path.read_text())]
        for device in spec["devices"]
    }
    assert {device.name for found in (answer, again) for device in found.cdi_devices} <= names


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run the plugin as root without capabilities")
def test_it_needs_no_capability(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin, folder: Path) -> None:
    """The kubelet's folders are 0750 and the agent's status 0600, root's: owning them is enough."""
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    plugin.start("--injection", "cdi", "--cdi-dir", str(folder / "cdi"), through=drop)
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 28, "units")
    capabilities = re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\S+)", _status(plugin.pid), re.MULTILINE)
    assert [int(bits, 16) for bits in capabilities] == [0, 0, 0]
    kubelet.admit("a", {OFFLINE: 3})
    assert [entry["owner"]["container"] for entry in plugin.allocations()["allocations"]] == ["a"]


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_metrics_and_health(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin, until: Until) -> None:
    port = free_port()
    plugin.start("--metrics-port", str(port))
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 28, "units")
    kubelet.admit("a", {OFFLINE: 3})
    kubelet.admit("b", {OFFLINE: 20})
    assert get(port, "/healthz") == "ok\n"
    text = get(port, "/metrics")
    for line in (
        f'valve_deviceplugin_offline_units{{gpu="{GPU_A}",state="lent"}} 12.0',
        f'valve_deviceplugin_offline_units{{gpu="{GPU_A}",state="used"}} 3.0',
        f'valve_deviceplugin_allocations_total{{outcome="ok",resource="{OFFLINE}"}} 1.0',
        f'valve_deviceplugin_allocations_total{{outcome="short",resource="{OFFLINE}"}} 1.0',
        "valve_deviceplugin_shortage_units 4.0",
        "valve_deviceplugin_agent_up 1.0",
        f'valve_deviceplugin_registrations_total{{resource="{ONLINE}"}} 1.0',
    ):
        assert line in text
    size = re.search(rf'^valve_deviceplugin_list_bytes{{resource="{OFFLINE}"}} (\S+)', text, re.MULTILINE)
    assert size
    assert float(size[1]) == kubelet.resources[OFFLINE].lists[-1].ByteSize()
    agent.stop()
    until(lambda: "valve_deviceplugin_agent_up 0.0" in get(port, "/metrics"), "the agent is missed")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(port, "/else")


def test_a_request_beyond_four_mebibytes(kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin) -> None:
    """A kubelet with many free ids asks with all of them; gRPC's default would refuse."""
    agent.gpus = {GPU_A: (16, 16, 0)}
    plugin.start()
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 16, "units")
    many = [f"aaaaaaaa-{index:06d}-{'x' * 40}" for index in range(80_000)]
    request = dp.PreferredAllocationRequest(
        container_requests=[
            dp.ContainerPreferredAllocationRequest(available_deviceIDs=many, allocation_size=2)
        ]
    )
    assert request.ByteSize() > 4 << 20
    answer = calls.PREFER.call(kubelet.resources[OFFLINE].channel)(request, timeout=30)
    assert len(answer.container_responses[0].deviceIDs) == 2


def test_an_init_container_and_its_pod_share_ids(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin
) -> None:
    """The kubelet gives the app container what the init container had, and more; one GPU, counted once."""
    plugin.start()
    kubelet.wait(lambda: kubelet.capacity(OFFLINE)[1] == 28, "units")
    kubelet.admit("other", {OFFLINE: 2}, pod="other")
    init = kubelet.admit("init", {OFFLINE: 4}, listed=False)
    main = kubelet.admit("main", {OFFLINE: 9}, reuse=init.ids)
    assert init.ids[OFFLINE] < main.ids[OFFLINE]
    assert init.answers[OFFLINE].envs["VALVE_GPU"] == main.answers[OFFLINE].envs["VALVE_GPU"] == GPU_A
    entries = plugin.allocations()["allocations"]
    assert sorted(entry["memory_gib"] for entry in entries) == [2, 9]


def test_a_device_that_is_no_gpu_brings_no_gpu(
    kubelet: FakeKubelet, agent: FakeAgent, plugin: Plugin
) -> None:
    agent.gpus = {"cpu": (8, 5, 1)}
    plugin.start()
    kubelet.wait(lambda: kubelet.capacity(OFFLINE) == (8, 5), "the cpu device is lent")
    answer = kubelet.admit("a", {OFFLINE: 5}).answers[OFFLINE]
    assert answer.envs["VALVE_GPU"] == "cpu"
    assert "NVIDIA_VISIBLE_DEVICES" not in answer.envs


@pytest.mark.parametrize(
    ("description", "arguments", "sentence"),
    [
        ("no state folder", ["--library", "/l", "--state-dir", "/proc/x"], "cannot be made"),
        ("a version that is no CDI name",
         ["--library", "/opt/a b", "--injection", "cdi", "--state-dir", "{tmp}/s", "--cdi-dir", "{tmp}/c"],
         "no CDI device name"),
        ("no bundle", ["install-runtime", "--from", "{tmp}", "--to", "{tmp}/to"], "must hold one"),
    ],
)  # fmt: skip
def test_what_cannot_start_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], description: str, arguments: list[str], sentence: str
) -> None:
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2, description
    assert sentence in capsys.readouterr().err
