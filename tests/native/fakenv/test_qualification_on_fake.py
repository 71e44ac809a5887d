# SPDX-License-Identifier: Apache-2.0
"""The qualification (e2e/gpu) on the fake driver: every part runs, says what is so, and can say that it is
not. Counts are tiny, and figures mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import fakenv

PROGRAM = Path(__file__).parents[3] / "e2e" / "gpu" / "qualify.py"
PARTS = [*(f"e{n}" for n in range(1, 17)), "preempt", "reclaim"]
"""All but `serving`, which needs torch."""


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first run builds libvalve and the rest."""
    return tmp_path_factory.mktemp("qualification")


class Qualify:
    def __init__(self, build: Path, out: Path) -> None:
        self._build, self._out = build, out

    def __call__(self, machine: fakenv.Machine, *parts: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
        """The documents, by part, and the exit status as "exit"."""
        done = subprocess.run(
            [*machine.prefix(), sys.executable, PROGRAM, "--parts", ",".join(parts),
             "--build", self._build, "--out", self._out, *options],
            env=machine.environment(), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        found: dict[str, Any] = {"exit": done.returncode, "stderr": done.stderr, "stdout": done.stdout}
        for part in parts:
            file = self._out / f"gpu-fake-{part}.json"
            if file.exists():
                found[part] = json.loads(file.read_text())
        return found


@pytest.fixture
def qualify(build: Path, tmp_path: Path) -> Qualify:
    return Qualify(build, tmp_path)


def test_every_part_is_green_on_a_driver_as_believed(machine: fakenv.Machine, qualify: Qualify) -> None:
    if os.geteuid() != 0:
        pytest.skip("e7 compares root with another user: run as root")
    found = qualify(machine, *PARTS)
    assert found["exit"] == 0, found["stdout"] + found["stderr"]
    assert [part for part in PARTS if found[part]["verdict"] not in ("pass", "finding")] == []
    for part in PARTS:
        document = found[part]
        assert document["schema"] == "valve.io/qualification/v1"
        assert (document["device"], document["driver"]) == ("fake", "580.142")
        assert document["kernel"] == os.uname().release
        assert document["command"] == f"make gpu PARTS={part}"
        assert document["commit"]
        assert document["utc"].endswith("+00:00")
        assert document["answer"]
        assert document["figures"]["xids"] == []
    contexts = found["e13"]["figures"]["several contexts"]
    assert contexts["more than one call holds"], contexts
    assert contexts["compute channels"] == 200
    status = machine.status()
    assert (status["remaps_while_running"], status["evict_timeouts"]) == (0, 0)
    assert (status["files"], status["channels"]) == ([], []), "it leaves nothing behind"


@pytest.mark.parametrize("branch", ["535", "595"])
def test_other_layouts(new_machine: fakenv.NewMachine, qualify: Qualify, branch: str) -> None:
    found = qualify(new_machine(branch=branch), "e1", "e9", "e15")
    assert [found[part]["verdict"] for part in ("e1", "e9", "e15")] == ["pass", "pass", "finding"]
    assert found["e15"]["answer"] == "every control answers"


def test_what_libcuda_calls_is_seen(machine: fakenv.Machine, qualify: Qualify) -> None:
    figures = qualify(machine, "e15")["e15"]["figures"]
    assert figures["channels captured"] == {"engine 1": 8, "engine 9": 1, "engine 10": 1}
    calls = figures["calls of libcuda"]
    assert calls["alloc 0xc86f: 0x00"] == 10, "through the transfer escape, in the long form"
    assert calls["alloc 0x2080: 0x00"] >= 1, "the short form"
    assert calls["control 0xa06c0101: 0x00"] == 3
    assert calls["uvm 27"] == 10


def test_a_gpu_on_which_disable_only_masks(machine: fakenv.Machine, qualify: Qualify) -> None:
    machine.ctl("evict", "commit")
    found = qualify(machine, "e1", "e3")
    assert found["exit"] == 1
    assert found["e1"]["verdict"] == "fail"
    assert found["e1"]["figures"]["cycles in which the kernel moved after the call"] > 0
    assert found["e3"]["verdict"] == "pass"
    assert "DISABLE alone does not evict; preempt does" in found["e3"]["answer"]


def test_a_gpu_on_which_siblings_keep_a_group(machine: fakenv.Machine, qualify: Qualify) -> None:
    assert "one suffices" in qualify(machine, "e2")["e2"]["answer"]
    machine.ctl("evict", "siblings")
    found = qualify(machine, "e2")["e2"]
    assert (found["verdict"], found["figures"]["channels that stop the kernel alone"]) == ("finding", [])
    assert found["answer"].endswith("no single channel does: all are needed")


def test_a_libcuda_that_waits_for_a_paused_context(machine: fakenv.Machine, qualify: Qualify) -> None:
    machine.ctl("unmap-syncs", 1)
    found = qualify(machine, "e8")["e8"]
    assert "libcuda waits for the context: in a kernel" in found["answer"]
    assert found["figures"]["idle, compute paused"]["returned while paused"] is True
    assert found["figures"]["in a kernel, compute paused"] | {"unmap_us": 0, "map_and_access_us": 0} == {
        "returned while paused": False, "returned after": True, "error": None,
        "unmap_us": 0, "map_and_access_us": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "part", "verdict", "says"),
    [
        ("deny control 0x2080110b 0x56", "e1", "error", "NOT_SUPPORTED"),
        ("deny control 0xa06f0111 0x1b", "e15", "finding", "refused: RESTART_RUNLIST"),
        ("validate patched", "e7", "pass", "an own file gets 0x00"),
    ],
    ids=["a sandbox", "a control is refused", "a patched driver"],
)
def test_other_machines(
    machine: fakenv.Machine, qualify: Qualify, words: str, part: str, verdict: str, says: str
) -> None:
    machine.ctl(*words.split())
    found = qualify(machine, part)[part]
    assert found["verdict"] == verdict, found
    assert says in found["answer"]


def test_a_driver_that_nobody_has_looked_at(new_machine: fakenv.NewMachine, qualify: Qualify) -> None:
    found = qualify(new_machine(branch="580", driver_version="585.10.01"), "e1", "preempt")
    assert found["e1"]["verdict"] == "pass"
    (note,) = found["e1"]["notes"]
    assert "585.10.01 is of no branch that Valve knows" in note
    assert "the layouts of 580 are assumed" in note
    assert set(found["preempt"]["figures"]) == {
        "launch-gate, neighbour: none", "launch-gate, neighbour: churn", "xids",
    }, "Valve itself takes no channel route there"  # fmt: skip


def test_an_xid_spoils_a_part(machine: fakenv.Machine, qualify: Qualify) -> None:
    ended = threading.Event()

    def report_xids() -> None:
        while not ended.wait(0.2):
            machine.ctl("xid", 0, 31)

    thread = threading.Thread(target=report_xids)
    thread.start()
    try:
        found = qualify(machine, "e15")
    finally:
        ended.set()
        thread.join()
    assert found["exit"] == 1
    assert found["e15"]["verdict"] == "fail"
    assert "Xid [31" in found["e15"]["answer"]
    assert set(found["e15"]["figures"]["xids"]) == {31}


def test_a_driver_that_hangs_does_not_hang_the_qualification(
    machine: fakenv.Machine, qualify: Qualify
) -> None:
    machine.ctl("delay", "control", 0x2080110B, 8_000_000, 1)
    found = qualify(machine, "e1", options=("--limit", "3"))
    assert found["exit"] == 1
    assert found["e1"]["verdict"] == "error"
    assert found["e1"]["answer"] == "did not end within 3 s; its processes were killed"
    assert qualify(machine, "e1")["e1"]["verdict"] == "pass", "without the delay it ends in time"


def test_a_part_that_is_cut_short_keeps_its_figures(machine: fakenv.Machine, qualify: Qualify) -> None:
    machine.ctl("delay", "control", 0xA06C0105, 8_000_000, 2)  # the second variant of e3: PREEMPT
    found = qualify(machine, "e3", options=("--limit", "6"))["e3"]
    assert found["verdict"] == "error"
    assert found["answer"].startswith("did not end within 6 s; its processes were killed; the figures")
    assert found["figures"]["none, busy"]["pause"]["count"] > 0
    assert "preempt, busy" not in found["figures"]


def test_a_case_that_breaks_leaves_the_others(machine: fakenv.Machine, qualify: Qualify) -> None:
    machine.ctl("deny", "control", 0x3D06, 0x56, 1)  # the first import of a slab
    found = qualify(machine, "reclaim")["reclaim"]
    assert (found["verdict"], found["answer"]) == ("fail", "broke: 8 MiB in slabs of 2 MiB: see figures")
    assert "NOT_SUPPORTED" in found["figures"]["8 MiB in slabs of 2 MiB"]["broke"]
    assert found["figures"]["8 MiB in slabs of 4 MiB"]["contents came back"] is True


def test_a_part_has_no_more_cycles_than_time(machine: fakenv.Machine, qualify: Qualify) -> None:
    machine.ctl("delay", "control", 0x2080110B, 100_000)
    found = qualify(machine, "e4", options=("--limit", "12", "--scale", "50"))["e4"]
    assert found["verdict"] == "pass", found
    assert 0 < found["figures"]["cycles"] < 1000
    (note,) = found["notes"]
    assert (
        note
        == f"pauses and resumes: {found['figures']['cycles']} of 1000 cycles, for the part's time is limited"
    )


def test_what_was_done_in_the_time_is_kept(machine: fakenv.Machine, build: Path, tmp_path: Path) -> None:
    machine.ctl("delay", "control", 0x2080110B, 8_000_000, 1)
    found = Qualify(build, tmp_path)(machine, "e1", "e15", "e16", options=("--within", "24", "--bundle"))
    documents = json.loads((tmp_path / "gpu-fake-parts.json").read_text())
    assert [document["part"] for document in documents] == ["e1"]
    assert found["exit"] == 1
    assert "not run, for time was up or the driver hangs: PARTS=e15,e16" in found["stdout"]


def test_one_file_for_all_parts(machine: fakenv.Machine, build: Path, tmp_path: Path) -> None:
    Qualify(build, tmp_path)(machine, "e15", "e16", options=("--bundle",))
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-fake-parts.json"]
    documents = json.loads((tmp_path / "gpu-fake-parts.json").read_text())
    assert [document["part"] for document in documents] == ["e15", "e16"]
    split = [sys.executable, PROGRAM, "--split", tmp_path / "gpu-fake-parts.json", "--out", tmp_path / "each"]
    subprocess.run(split, check=True, timeout=60)
    assert json.loads((tmp_path / "each" / "gpu-fake-e16.json").read_text()) == documents[1]


@pytest.mark.parametrize(
    ("options", "parts", "says"),
    [
        ({"no_driver": True}, ("e1",), "there is no NVIDIA driver on this machine"),
        ({}, ("e1", "e99"), "no part e99; there are: e1, e2"),
    ],
    ids=["no driver", "no such part"],
)
def test_nothing_can_be_run(
    new_machine: fakenv.NewMachine,
    qualify: Qualify,
    options: dict[str, Any],
    parts: tuple[str, ...],
    says: str,
) -> None:
    found = qualify(new_machine(**options), *parts)
    assert found["exit"] == 2
    assert says in found["stderr"]
