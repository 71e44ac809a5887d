# SPDX-License-Identifier: Apache-2.0
"""What a container is given, by mounts and by CDI, and the spec files on the node."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pytest

from valve_api.names import Workload
from valve_deviceplugin import cdi
from valve_deviceplugin.injection import Runtime, injection

RUNTIME = Runtime(PurePosixPath("/opt/valve/0.1.0"), PurePosixPath("/run/valve/agent.sock"))
COMMON = {"VALVE_SOCKET": "/run/valve/agent.sock", "VALVE_PYTHONPATH": "/opt/valve/0.1.0/python"}
OFFLINE = {**COMMON, "VALVE_WORKLOAD": "offline"}
ONLINE = {**COMMON, "VALVE_WORKLOAD": "online"}


@pytest.mark.parametrize(
    ("description", "workload", "by_cdi", "access", "env", "names"),
    [
        ("offline, mounts", Workload.OFFLINE, False, "none",
         {**OFFLINE, "VALVE_GPU": "A,B", "VALVE_MEMORY_GIB": "7"}, []),
        ("online, mounts: no limit", Workload.ONLINE, False, "none", {**ONLINE, "VALVE_GPU": "A,B"}, []),
        ("the GPU by NVIDIA's runtime", Workload.ONLINE, False, "env",
         {**ONLINE, "VALVE_GPU": "A,B", "NVIDIA_VISIBLE_DEVICES": "A,B"}, []),
        ("the GPU by CDI", Workload.ONLINE, False, "cdi", {**ONLINE, "VALVE_GPU": "A,B"},
         ["nvidia.com/gpu=A", "nvidia.com/gpu=B"]),
        ("all by CDI: the rest is in the spec", Workload.OFFLINE, True, "none",
         {"VALVE_GPU": "A,B", "VALVE_MEMORY_GIB": "7"}, ["valve.io/runtime=0.1.0-offline"]),
        ("two CDI devices", Workload.ONLINE, True, "cdi", {"VALVE_GPU": "A,B"},
         ["valve.io/runtime=0.1.0-online", "nvidia.com/gpu=A", "nvidia.com/gpu=B"]),
    ],
)  # fmt: skip
def test_injection(
    description: str, workload: Workload, by_cdi: bool, access: str, env: dict[str, str], names: list[str]
) -> None:
    given = injection(RUNTIME, workload, ["A", "B"], 7, by_cdi=by_cdi, gpu_access=access)
    assert given.env == env, description
    assert given.cdi == names, description
    assert (given.mounts == []) == by_cdi
    assert "PYTHONPATH" not in given.env, "it would replace the image's"


def test_both_ways_give_the_same() -> None:
    """Env and mounts of a CDI device are those of the response without CDI."""
    for workload in Workload:
        direct = injection(RUNTIME, workload, ["A"], 7, by_cdi=False, gpu_access="none")
        by_cdi = injection(RUNTIME, workload, ["A"], 7, by_cdi=True, gpu_access="none")
        (name,) = by_cdi.cdi
        (edits,) = (
            device["containerEdits"]
            for device in cdi.spec(RUNTIME)["devices"]
            if name == f"{cdi.spec(RUNTIME)['kind']}={device['name']}"
        )
        assert dict(line.split("=", 1) for line in edits["env"]) | by_cdi.env == direct.env
        assert [(m["hostPath"], m["containerPath"]) for m in edits["mounts"]] == [
            (m.host, m.container) for m in direct.mounts
        ]
        assert all("ro" in m["options"] for m in edits["mounts"])


def test_specs_of_versions_in_use_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "cdi"
    foreign = folder / "nvidia.json"
    versions = [Runtime(PurePosixPath("/opt/valve") / name, RUNTIME.agent_socket) for name in ("1", "2", "3")]
    for runtime in versions:
        cdi.ensure(folder, runtime)
    foreign.write_text("{}")
    removed = cdi.keep_only(folder, ["/opt/valve/2", "/opt/valve/3"])
    assert removed == ["valve.io-runtime-1.json"]
    left = ["nvidia.json", "valve.io-runtime-2.json", "valve.io-runtime-3.json"]
    assert sorted(p.name for p in folder.iterdir()) == left, "no scratch file, nothing of others"


def test_a_spec_is_written_when_it_differs_only(tmp_path: Path) -> None:
    cdi.ensure(tmp_path, RUNTIME)
    path = cdi.path_of(tmp_path, RUNTIME)
    before = path.stat()
    cdi.ensure(tmp_path, RUNTIME)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino
    path.write_text("{}")
    cdi.ensure(tmp_path, RUNTIME)
    assert json.loads(path.read_text()) == cdi.spec(RUNTIME)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("library", "usable"), [("/opt/valve/0.1.0-rc.1", True), ("/opt/valve/a b", False)])
def test_a_version_must_make_a_device_name(library: str, usable: bool) -> None:
    assert cdi.usable(Runtime(PurePosixPath(library), RUNTIME.agent_socket)) == usable
