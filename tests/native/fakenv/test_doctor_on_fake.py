# SPDX-License-Identifier: Apache-2.0
"""`valve doctor` on machines with the fake driver: every layout, every failure that it can play."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import fakenv

AGENT, IN_PROCESS, PATCHED, LAUNCH_GATE = "agent", "in-process", "patched", "launch-gate"


def doctor(machine: fakenv.Machine, *options: str, libraries: bool = True) -> tuple[int, dict[str, Any]]:
    """Exit status and report of `valve doctor -o json` on that machine."""
    done = subprocess.run(
        [*machine.prefix(), sys.executable, "-m", "valve_cli.main", "doctor", "-o", "json", *options],
        env=machine.environment() if libraries else dict(os.environ),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def levels(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["level"] for check in report["checks"] if check["section"] == "nvidia"}


def sentence(report: dict[str, Any], name: str) -> str:
    check = next(check for check in report["checks"] if check["name"] == name)
    return f"{check['found']} {check['todo']}"


@pytest.mark.parametrize("branch", fakenv.BRANCHES)
def test_a_good_machine(new_machine: fakenv.NewMachine, branch: str) -> None:
    machine = new_machine(branch=branch, gpus=2, memory_mib=2048)
    code, report = doctor(machine)
    assert (code, report["device"], report["route"]) == (0, "nvidia", AGENT)
    assert report["driver"]["branch"] == branch
    assert report["driver"]["version"].startswith(branch + ".")
    assert report["driver"]["flavour"] == "open"
    assert [gpu["name"] for gpu in report["gpus"]] == ["NVIDIA Fake GPU"] * 2
    assert len({gpu["uuid"] for gpu in report["gpus"]}) == 2
    assert all(gpu["memory_bytes"] for gpu in report["gpus"])
    assert {route["name"]: route["usable"] for route in report["routes"]} == {
        AGENT: True, IN_PROCESS: True, PATCHED: False, LAUNCH_GATE: True,
    }  # fmt: skip
    assert set(levels(report).values()) <= {"ok"}
    status = machine.status()
    assert (status["files"], status["clients"]) == ([], []), "it leaves nothing behind"


def test_without_a_driver(new_machine: fakenv.NewMachine) -> None:
    machine = new_machine(no_driver=True)
    code, report = doctor(machine, libraries=False)
    assert (code, report["device"], report["driver"]["version"]) == (0, "cpu", None)
    code, report = doctor(machine, "--device", "nvidia", libraries=False)
    assert (code, report["usable"], report["route"]) == (1, False, None)
    assert levels(report) == {"driver": "missing"}


def test_an_unknown_driver(new_machine: fakenv.NewMachine) -> None:
    code, report = doctor(new_machine(driver_version="610.43.02"))
    assert (code, report["route"], report["driver"]["branch"]) == (0, LAUNCH_GATE, None)
    assert "never looked at" in sentence(report, "layouts")


def test_without_libcuda(new_machine: fakenv.NewMachine) -> None:
    code, report = doctor(new_machine(), libraries=False)
    assert (code, report["route"]) == (0, AGENT)
    assert levels(report)["libcuda"] == "warning"
    assert [route["name"] for route in report["routes"] if route["usable"]] == [AGENT, IN_PROCESS]


@pytest.mark.parametrize(
    ("words", "route", "says"),
    [
        ("deny control 0x2080110b 0x1b", LAUNCH_GATE, "run as root"),
        ("deny control 0x2080110b 0x56", LAUNCH_GATE, "sandbox"),
        ("deny control 0x2080110b 0x65", LAUNCH_GATE, "firmware does not answer"),
        ("deny control 0x2080110b 0x0f", LAUNCH_GATE, "fallen off the bus"),
    ],
    ids=["no permission", "filtered", "firmware is silent", "gpu lost"],
)
def test_the_control_is_refused(machine: fakenv.Machine, words: str, route: str, says: str) -> None:
    machine.ctl(*words.split())
    code, report = doctor(machine)
    assert (code, report["route"]) == (0, route)
    assert levels(report)["GPU 0"] == "warning"
    assert says in sentence(report, "GPU 0")


def test_no_client_for_us(machine: fakenv.Machine) -> None:
    machine.ctl("deny", "alloc", 0x41, 0x1B)
    code, report = doctor(machine)
    assert (code, report["usable"], report["route"]) == (1, False, None)
    assert levels(report)["control"] == "missing"
    assert levels(report)["routes"] == "missing"
    assert "INSUFFICIENT_PERMISSIONS" in sentence(report, "control")


def test_a_lost_gpu(new_machine: fakenv.NewMachine) -> None:
    machine = new_machine(gpus=2)
    machine.ctl("lost", 1, 1)
    code, report = doctor(machine)
    assert (code, report["route"]) == (0, AGENT)
    assert (levels(report)["GPU 0"], levels(report)["GPU 1"]) == ("ok", "warning")
    machine.ctl("lost", 0, 1)
    code, report = doctor(machine)
    assert (code, report["usable"]) == (1, False)
    assert levels(report)["GPU 0"] == "missing"


def test_a_patched_driver(machine: fakenv.Machine) -> None:
    if os.geteuid() != 0:
        pytest.skip("what the patch allows needs CAP_SYS_ADMIN")
    machine.ctl("validate", "patched")
    _, report = doctor(machine)
    assert next(r for r in report["routes"] if r["name"] == PATCHED)["usable"]
    assert report["route"] == AGENT, "the stock way goes first"


def test_a_driver_that_does_not_answer(machine: fakenv.Machine) -> None:
    machine.ctl("hold", 8000)
    code = (
        "import json; from valve_cli.doctor_nvidia import ask;"
        "print(json.dumps(ask('rm', '580', deadline_s=1.0)))"
    )
    done = subprocess.run(
        [*machine.prefix(), sys.executable, "-c", code],
        env=machine.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "did not answer within 1 s" in json.loads(done.stdout)["error"]
