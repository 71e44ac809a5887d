# SPDX-License-Identifier: Apache-2.0
"""The GPU side of `valve doctor`: driver, GPUs, and which route stops offline compute on this machine.

Threading model: none; runs two short processes (doctor_probe.py) with a deadline each. What they find is a
plain object, and judging it is a pure function, so that every failure can be tested. Caller: doctor.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia import rm
from valve_agent.devices.nvidia.probe import ORDER
from valve_cli.doctor_report import Check, Gpu, Level, Nvidia, Route

VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"
DEADLINE_S = 20.0

Facts = Mapping[str, Any]


class Files(NamedTuple):
    """What the file system says of the driver."""

    pci_gpus: int
    version: str | None
    error: str | None
    """Why the version could not be read."""
    flavour: str | None
    nodes: Mapping[str, str]
    """/dev node -> '' if it can be opened, else why not."""
    mps: bool
    """An MPS server runs."""


def look() -> Nvidia:
    """Everything, on this machine."""
    files = _files(Path("/"))
    if files.version is None:
        return judge(files, None, None)
    return judge(files, ask("rm", files.version), ask("cuda"))


def judge(files: Files, rm_facts: Facts | None, cuda_facts: Facts | None) -> Nvidia:
    """`rm_facts`, `cuda_facts`: what doctor_probe.py printed; None where it was not asked."""
    present = files.pci_gpus > 0 or files.version is not None or files.error is not None
    branch = rm.branch_of(files.version) if files.version else None
    checks = [_driver(files)]
    if files.version is None:
        return Nvidia(present, None, None, None, (), (), checks)
    checks += [_layouts(files.version, branch), *_nodes(files.nodes), _cuda(cuda_facts or {})]
    if files.mps:
        checks.append(_nvidia(
            "MPS", "warning", "an MPS control daemon runs",
            "stop it for GPUs that Valve shares: one client of MPS cannot be paused without the others",
        ))  # fmt: skip
    gpus = _gpus(rm_facts or {}, cuda_facts or {})
    checks += _control(rm_facts or {}, branch)
    routes = _routes(rm_facts or {}, cuda_facts or {})
    if not any(route.usable for route in routes):
        checks.append(_nvidia(
            "routes", "missing", "no way to stop offline compute on this machine",
            "follow the lines above; until then the agent refuses offline processes (fail closed)",
        ))  # fmt: skip
    return Nvidia(
        present, files.version, branch.name if branch else None, files.flavour, gpus, routes, checks
    )


def _nvidia(name: str, level: Level, found: str, todo: str = "") -> Check:
    return Check("nvidia", name, level, found, todo)


def _driver(files: Files) -> Check:
    if files.version:
        flavour = f"{files.flavour} kernel modules" if files.flavour else "kernel modules of unknown kind"
        if files.flavour == "proprietary":
            return _nvidia(
                "driver", "warning", f"{files.version}, {flavour}",
                "Valve was written from the sources of the open kernel modules; install those (the default "
                "from 560 on), or check this machine with `make gpu`",
            )  # fmt: skip
        return _nvidia("driver", "ok", f"{files.version}, {flavour}")
    if files.error:
        return _nvidia("driver", "missing", files.error, "reinstall the NVIDIA driver, or mount /proc")
    if files.pci_gpus:
        return _nvidia(
            "driver", "missing", f"{files.pci_gpus} NVIDIA GPU(s) on the PCI bus, no driver loaded",
            f"install and load the NVIDIA driver ({', '.join(rm.BRANCHES)}; open kernel modules): "
            "`modprobe nvidia nvidia-uvm`",
        )  # fmt: skip
    return _nvidia(
        "driver", "missing", "no NVIDIA driver and no NVIDIA GPU on this machine",
        "nothing for the cpu device; for GPUs run this on a GPU node",
    )  # fmt: skip


def _layouts(version: str, branch: rm.Branch | None) -> Check:
    if branch:
        return _nvidia("layouts", "ok", f"branch {branch.name}, as read in {branch.read_from}")
    known = ", ".join(rm.BRANCHES)
    return _nvidia(
        "layouts", "warning", f"the branch of driver {version} was never looked at (known: {known})",
        "use a driver of a known branch, or live with route `launch-gate`: no channel is stopped by guess",
    )  # fmt: skip


def _nodes(nodes: Mapping[str, str]) -> list[Check]:
    bad = {path: why for path, why in nodes.items() if why}
    if not bad:
        return [_nvidia("device files", "ok", ", ".join(nodes))]
    some_gpu = any(path[len("/dev/nvidia") :].isdigit() and not why for path, why in nodes.items())
    hints = {
        "/dev/nvidia-uvm": "`modprobe nvidia-uvm && nvidia-modprobe -u -c 0`",
        rm.CTL_PATH: "`nvidia-modprobe -c 0`, or run as a user who may open it; in a container: mount it",
    }
    return [
        _nvidia(
            path,
            "missing" if path in hints or not some_gpu else "warning",
            why,
            hints.get(path, "look at `dmesg | grep -iE 'nvrm|xid'`; in a container: mount it"),
        )
        for path, why in bad.items()
    ]


def _cuda(facts: Facts) -> Check:
    if facts.get("error"):
        return _nvidia(
            "libcuda", "warning", str(facts["error"]),
            "the agent's memory pool needs libcuda.so.1 of the driver's version: install it, or mount it "
            "into the agent's container (LD_LIBRARY_PATH)",
        )  # fmt: skip
    lacking = [
        index
        for index, device in enumerate(facts.get("devices", ()))
        if device.get("virtual_memory") != 1 or device.get("handles_as_descriptors") != 1
    ]
    if lacking:
        return _nvidia(
            "libcuda", "warning", f"GPU {lacking}: no virtual memory management with file descriptors",
            "offline memory cannot be taken back on these GPUs; they are shared in time only",
        )  # fmt: skip
    return _nvidia(
        "libcuda", "ok", f"CUDA {facts.get('version')}, {len(facts.get('devices', ()))} GPU(s), "
        f"{facts.get('path')}",
    )  # fmt: skip


def _gpus(rm_facts: Facts, cuda_facts: Facts) -> list[Gpu]:
    memory = [device["memory_bytes"] for device in cuda_facts.get("devices", ())]
    listed = rm_facts.get("gpus", ())
    return [
        Gpu(
            gpu["number"],
            gpu["name"] or "?",
            gpu["uuid"],
            memory[at] if len(memory) == len(listed) else None,
        )
        for at, gpu in enumerate(listed)
    ]


def _control(facts: Facts, branch: rm.Branch | None) -> list[Check]:
    """What the driver says to the control that stops channels."""
    if branch is None:
        return []
    if facts.get("error"):
        return [_nvidia("control", "missing", str(facts["error"]), _hint(facts.get("client")))]
    if not facts["gpus"]:
        return [_nvidia(
            "control", "missing", "the driver has no GPU",
            "look at `dmesg | grep -i nvrm`; in a container: mount /dev/nvidia0 and up",
        )]  # fmt: skip
    checks = []
    broken: Level = "warning" if any(not gpu["error"] for gpu in facts["gpus"]) else "missing"
    for gpu in facts["gpus"]:
        name = f"GPU {gpu['number']}"
        if gpu["error"]:
            status = rm.GPU_IS_LOST if f"0x{rm.GPU_IS_LOST:02x}" in gpu["error"] else None
            checks.append(_nvidia(name, broken, str(gpu["error"]), _hint(status)))
        elif gpu["own"] == rm.OK:
            checks.append(_nvidia(name, "ok", f"{gpu['name']} {gpu['uuid']}: channel control is permitted"))
        else:
            checks.append(_nvidia(
                name, "warning", f"{gpu['name']}: DISABLE_CHANNELS answers {rm.describe(gpu['own'])}",
                _hint(gpu["own"]),
            ))  # fmt: skip
    return checks


def _hint(status: int | None) -> str:
    return {
        rm.INSUFFICIENT_PERMISSIONS: "run as root; if it is root: a sandbox or a security module forbids it",
        rm.NOT_SUPPORTED: "a sandbox (gVisor) or a vGPU guest filters it, or firmware (GSP) is off: "
        "remove NVreg_EnableGpuFirmware=0",
        rm.GPU_IS_LOST: "the GPU needs a reset or the machine a restart: look at `dmesg | grep -i xid`",
        rm.TIMEOUT: "the GPU's firmware does not answer: look at `dmesg | grep -i xid`, restart the machine",
    }.get(status if status is not None else -1, "look at `dmesg | grep -iE 'nvrm|xid'`")


def _routes(rm_facts: Facts, cuda_facts: Facts) -> list[Route]:
    """The agent's own verdicts; `launch-gate` needs libcuda beside."""
    verdicts = {verdict["route"]: verdict for verdict in rm_facts.get("routes", ())}
    unasked = {"works": False, "why": rm_facts.get("error") or "not asked"}
    found = []
    for name in ORDER[:-1]:
        verdict = verdicts.get(name, unasked)
        found.append(Route(name, bool(verdict["works"]), str(verdict["why"])))
    return [*found, _launch_gate(cuda_facts.get("error") if cuda_facts else "libcuda was not asked")]


def _launch_gate(problem: str | None) -> Route:
    return Route("launch-gate", not problem, problem or "holds launches; what runs is not stopped")


def _files(root: Path) -> Files:
    version = error = None
    try:
        version = rm.driver_version()
    except DeviceError as problem:
        error = str(problem)
    nodes = {}
    if version:
        gpus = [path for number in range(64) if os.path.exists(path := f"/dev/nvidia{number}")]
        nodes = {path: _open(path) for path in (rm.CTL_PATH, "/dev/nvidia-uvm", *gpus)}
    return Files(_pci_gpus(root), version, error, flavour(_read(Path(rm.VERSION_PATH))), nodes, _mps(root))


def flavour(version_text: str) -> str | None:
    """`open` or `proprietary`, from the text of /proc/driver/nvidia/version; None for neither."""
    first = version_text.partition("\n")[0]
    if "Open Kernel Module" in first:
        return "open"
    return "proprietary" if "Kernel Module" in first else None


def _pci_gpus(root: Path) -> int:
    folder = root / "sys/bus/pci/devices"
    return sum(
        _read(path / "vendor").strip() == VENDOR and _read(path / "class").startswith(DISPLAY_CLASS)
        for path in (folder.iterdir() if folder.is_dir() else ())
    )


def _mps(root: Path) -> bool:
    names = (_read(path / "comm").strip() for path in (root / "proc").iterdir() if path.name.isdigit())
    return any(name.startswith("nvidia-cuda-mps") for name in names)


def _open(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""  # a process that ended, a file that this kernel does not have: nothing found there


def ask(*words: str, deadline_s: float = DEADLINE_S) -> Facts:
    """One run of doctor_probe.py; a failure of it is a fact too."""
    command: Sequence[str] = [sys.executable, "-m", "valve_cli.doctor_probe", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, complaints = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1)  # a call that cannot be interrupted outlives us
        return {
            "error": f"the driver did not answer within {deadline_s:.0f} s: somebody holds it in a long "
            "call, or firmware hangs",
            "gpus": [],
        }
    if process.returncode:
        last = complaints.strip().splitlines()[-1:] or [f"ended with {process.returncode}"]
        return {"error": f"the question to the driver failed: {last[0]}", "gpus": []}
    answer: Facts = json.loads(printed)
    return answer
