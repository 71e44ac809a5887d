# SPDX-License-Identifier: Apache-2.0
"""What `valve doctor` makes of what it finds: levels, routes, verdict, exit status. The driver's answers are
made up here; tests/native/fakenv/test_doctor_on_fake.py gets them from the fake driver."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.probe import ORDER
from valve_cli import doctor, doctor_machine, doctor_nvidia
from valve_cli.doctor_nvidia import Files, flavour, judge
from valve_cli.doctor_report import Check, Nvidia, Report

NODES = {"/dev/nvidiactl": "", "/dev/nvidia-uvm": "", "/dev/nvidia0": ""}
GOOD = Files(1, "580.142", None, "open", NODES, False)
GPU = {"number": 0, "name": "G", "uuid": "GPU-1", "error": None, "own": rm.OK}
STOCK = {"agent": True, "in-process": True, "patched": False, "launch-gate": True}
DEVICE = {"virtual_memory": 1, "handles_as_descriptors": 1, "memory_bytes": 80 << 30}
CUDA = {"error": None, "path": "/lib/libcuda.so.1", "version": "13.0", "devices": [DEVICE]}


def rm_answer(*, routes: dict[str, bool] | None = None, **gpu: Any) -> dict[str, Any]:
    """What the probe's process prints; `routes` that differ from a stock driver's."""
    verdicts = [{"route": r, "works": w, "why": "so"} for r, w in {**STOCK, **(routes or {})}.items()]
    return {"error": None, "client": rm.OK, "gpus": [{**GPU, **gpu}], "routes": verdicts}


RM = rm_answer()
NO_CONTROL = {"agent": False, "in-process": False, "patched": False}


TABLE: list[tuple[str, Files, Any, Any, str | None, dict[str, str]]] = [
    ("all well", GOOD, RM, CUDA, "agent", {"driver": "ok", "layouts": "ok", "GPU 0": "ok"}),
    ("no driver, no GPU", Files(0, None, None, None, {}, False), None, None, None, {"driver": "missing"}),
    ("a GPU without driver", Files(2, None, None, None, {}, False), None, None, None, {"driver": "missing"}),
    ("a version file in no known shape", GOOD._replace(version=None, error="names no driver version"),
     None, None, None, {"driver": "missing"}),
    ("an unknown branch", GOOD._replace(version="610.1"), {**rm_answer(routes=NO_CONTROL), "gpus": []}, CUDA,
     "launch-gate", {"layouts": "warning"}),
    ("proprietary modules", GOOD._replace(flavour="proprietary"), RM, CUDA, "agent", {"driver": "warning"}),
    ("no UVM", GOOD._replace(nodes={**NODES, "/dev/nvidia-uvm": "No such file"}), RM, CUDA, "agent",
     {"/dev/nvidia-uvm": "missing"}),
    ("one GPU of two is gone",
     GOOD._replace(nodes={**NODES, "/dev/nvidia1": "Input/output error"}),
     {**RM, "gpus": [GPU, {**GPU, "number": 1, "error": "status 0x0f"}]}, CUDA, "agent",
     {"/dev/nvidia1": "warning", "GPU 0": "ok", "GPU 1": "warning"}),
    ("the only GPU is gone", GOOD, rm_answer(error="status 0x0f: ...", routes=NO_CONTROL), CUDA,
     "launch-gate", {"GPU 0": "missing"}),
    ("the passed file is refused", GOOD, rm_answer(routes={"agent": False}), CUDA, "in-process",
     {"GPU 0": "ok"}),
    ("only root by name", GOOD,
     rm_answer(own=rm.INSUFFICIENT_PERMISSIONS, routes={**NO_CONTROL, "patched": True}), CUDA,
     "patched", {"GPU 0": "warning"}),
    ("a sandbox filters the control", GOOD, rm_answer(own=0x56, routes=NO_CONTROL), CUDA, "launch-gate",
     {"GPU 0": "warning"}),
    ("nothing at all works", GOOD, rm_answer(own=0x56, routes=NO_CONTROL), {"error": "no libcuda"}, None,
     {"libcuda": "warning", "routes": "missing"}),
    ("RM refuses a client", GOOD, {"error": "class 0x41: ...", "client": 0x1B, "gpus": []}, CUDA,
     "launch-gate", {"control": "missing"}),
    ("the driver lists no GPU", GOOD, {**rm_answer(routes=NO_CONTROL), "gpus": []}, CUDA, "launch-gate",
     {"control": "missing"}),
    ("no memory management", GOOD, RM, {**CUDA, "devices": [{**DEVICE, "virtual_memory": 0}]}, "agent",
     {"libcuda": "warning"}),
    ("MPS runs", GOOD._replace(mps=True), RM, CUDA, "agent", {"MPS": "warning"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "files", "rm_facts", "cuda_facts", "route", "levels"), TABLE, ids=[row[0] for row in TABLE]
)
def test_judge(
    what: str, files: Files, rm_facts: Any, cuda_facts: Any, route: str | None, levels: dict[str, str]
) -> None:
    found = judge(files, rm_facts, cuda_facts)
    assert found.route == route, what
    by_name = {check.name: check for check in found.checks}
    assert {name: by_name[name].level for name in levels} == levels
    for check in found.checks:
        assert check.section == "nvidia"
        assert bool(check.todo) == (check.level in ("warning", "missing")), check
    if found.routes:
        assert tuple(r.name for r in found.routes) == ORDER
        assert all(r.why for r in found.routes)


def test_the_gpus_carry_their_memory() -> None:
    (gpu,) = judge(GOOD, RM, CUDA).gpus
    assert gpu == (0, "G", "GPU-1", 80 << 30)
    (gpu,) = judge(GOOD, RM, {"error": "no libcuda"}).gpus
    assert gpu.memory_bytes is None, "nobody could tell: not 0"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.1  Release\n", "open"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1  Tue\n", "proprietary"),
        ("", None),
    ],
)
def test_flavour(text: str, kind: str | None) -> None:
    assert flavour(text) == kind


NONE = Nvidia(False, None, None, None, (), (), ())


@pytest.mark.parametrize(
    ("wanted", "nvidia", "device"),
    [("auto", NONE, "cpu"), ("auto", NONE._replace(present=True), "nvidia"), ("cpu", NONE, "cpu"),
     ("cpu", NONE._replace(present=True), "cpu"), ("nvidia", NONE, "nvidia")],
)  # fmt: skip
def test_choice_of_the_device(wanted: str, nvidia: Nvidia, device: str) -> None:
    assert doctor.choose(wanted, nvidia)[0] == device


def test_what_makes_a_machine_unusable() -> None:
    well = judge(GOOD, RM, CUDA)
    bad = Check("machine", "pidfd_open", "missing", "no", "do")
    assert Report("nvidia", "", well.checks, well).usable
    assert not Report("nvidia", "", [bad], well).usable
    assert not Report("nvidia", "", (), NONE).usable, "no route"
    assert Report("cpu", "", judge(Files(0, None, None, None, {}, False), None, None).checks, NONE).usable
    weak = Check("machine", "memlock", "warning", "little", "raise it")
    assert Report("cpu", "", [weak], NONE).usable, "a warning is no refusal"


def run(monkeypatch: pytest.MonkeyPatch, nvidia: Nvidia, *argv: str) -> int:
    monkeypatch.setattr(doctor_nvidia, "look", lambda: nvidia)
    return doctor.main(list(argv))


def test_no_driver_is_a_note_for_the_cpu_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = judge(Files(0, None, None, None, {}, False), None, None)
    assert run(monkeypatch, without) == 0
    text = capsys.readouterr().out
    assert "MISSING" not in text
    assert "no NVIDIA driver and no NVIDIA GPU" in text
    assert text.endswith("ready:  valve agent --device cpu\n")
    assert run(monkeypatch, without, "--device", "nvidia") == 1
    text = capsys.readouterr().out
    assert "MISSING driver" in text
    assert text.endswith("not ready: driver\n")


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, judge(GOOD, RM, CUDA), "-o", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "valve.io/doctor/v1"
    assert (document["device"], document["usable"], document["route"]) == ("nvidia", True, "agent")
    assert document["driver"] == {"version": "580.142", "branch": "580", "flavour": "open"}
    assert document["gpus"] == [{"number": 0, "name": "G", "uuid": "GPU-1", "memory_bytes": 80 << 30}]
    assert [route["name"] for route in document["routes"]] == list(ORDER)
    assert {check["section"] for check in document["checks"]} == {"machine", "cpu", "nvidia"}


def test_wrong_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["-o", "xml"])
    assert ended.value.code == 2


def test_this_machine_has_what_the_cpu_device_needs() -> None:
    checks = [*doctor_machine.machine_checks(), *doctor_machine.cpu_checks()]
    assert [check for check in checks if check.level == "missing"] == []
    names = {check.name for check in checks}
    assert names >= {
        "pidfd_open",
        "pidfd_getfd",
        "membarrier",
        "huge pages",
        "memlock",
        "kcmp",
        "descriptors",
    }
    assert all(check.todo for check in checks if check.level == "warning")


@pytest.mark.parametrize(
    ("status", "have"),
    [
        ("CapEff:\t0000000000000000\n", set()),
        ("Name:\tx\nCapEff:\t000001ffffffffff\n", set(doctor_machine.CAPABILITIES)),
        ("CapEff:\t0000000000080000\n", {"CAP_SYS_PTRACE"}),
        ("", set()),
    ],
)
def test_capabilities(status: str, have: set[str]) -> None:
    assert doctor_machine.capabilities(status) == have


def made_up_root(folder: Path, cap_eff: str, yama: str) -> Path:
    for path, text in (
        ("proc/self/status", f"CapEff:\t{cap_eff}\n"),
        ("proc/sys/kernel/yama/ptrace_scope", yama),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def test_what_privileges_change(tmp_path: Path) -> None:
    def levels(root: Path) -> dict[str, str]:
        return {check.name: check.level for check in doctor_machine.machine_checks(root)}

    none = levels(made_up_root(tmp_path / "none", "0" * 16, "1\n"))
    assert (none["privileges"], none["pidfd_getfd"]) == ("warning", "warning")
    everything = levels(made_up_root(tmp_path / "all", "000001ffffffffff", "1\n"))
    assert (everything["privileges"], everything["pidfd_getfd"], everything["memlock"]) == ("ok", "ok", "ok")
    assert levels(made_up_root(tmp_path / "yama", "000001ffffffffff", "3\n"))["pidfd_getfd"] == "warning"


def test_limits_are_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def check_with(limit: int, name: str) -> Check:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
        checks = doctor_machine.machine_checks(made_up_root(tmp_path, "0" * 16, "0"))
        return next(check for check in checks if check.name == name)

    for name, little, enough in (("descriptors", 1024, 65_536), ("memlock", 65_536, 64 << 20)):
        assert check_with(little, name).level == "warning"
        assert check_with(enough, name).level == "ok"
        assert check_with(resource.RLIM_INFINITY, name).level == "ok"
