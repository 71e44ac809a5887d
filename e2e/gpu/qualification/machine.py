# SPDX-License-Identifier: Apache-2.0
"""The machine under qualification: what it is, and what has to be built on it first.

Threading model: none. Callers: qualify.py, rig.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from qualification.record import Skip
from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia import rm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FAKE = "NVIDIA Fake GPU"
FAKE_DEVICE = "fake"


@dataclass(frozen=True)
class Machine:
    device: str
    """The GPU's name, or `fake`."""
    driver: str
    branch: rm.Branch
    kernel: str

    @property
    def is_fake(self) -> bool:
        return self.device == FAKE_DEVICE


def slug(device: str) -> str:
    """The device in a file's name: 'h100-80gb-hbm3'."""
    words = device.lower().replace("nvidia", " ").split()
    return "-".join("".join(c for c in word if c.isalnum() or c in "_.-") for word in words)


@dataclass(frozen=True)
class Tools:
    """What was built. Paths."""

    libvalve: Path
    observer: Path
    online: Path
    kernels: str
    """compiled kernels; '' on the fake driver, which takes any image"""


def this() -> Machine:
    """Raises Skip where there is no driver, or one of an unknown branch."""
    try:
        version = rm.driver_version()
    except DeviceError as error:
        raise Skip(str(error)) from error
    if version is None:
        raise Skip("there is no NVIDIA driver on this machine: run on a GPU node, or under tests/fakenv")
    branch = rm.branch_of(version)
    if branch is None:
        raise Skip(f"driver {version} is of no branch that Valve knows ({', '.join(rm.BRANCHES)})")
    name = gpu_name()
    return Machine(FAKE_DEVICE if name == FAKE else name, version, branch, platform.release())


def gpu_name() -> str:
    """The first GPU's, by libcuda. Raises Skip."""
    cuda = _libcuda()
    name = ctypes.create_string_buffer(128)
    code = cuda.cuInit(0) or cuda.cuDeviceGetName(name, 128, 0)
    if code:
        raise Skip(f"libcuda finds no GPU (error {code}): run `valve doctor`")
    return name.value.decode()


def capability() -> int:
    """90 for compute capability 9.0."""
    cuda = _libcuda()
    cuda.cuInit(0)
    parts = [ctypes.c_int(), ctypes.c_int()]
    for value, attribute in zip(parts, (75, 76), strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return parts[0].value * 10 + parts[1].value


def build(machine: Machine, folder: Path) -> Tools:
    """Everything, into `folder`. Raises Skip naming the tool that is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = _runtime_build()
    try:
        libvalve = bundle.build(folder / "runtime")
    except bundle.BuildError as error:
        raise Skip(str(error)) from error
    cc = bundle.compiler()
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    observer, online = folder / "observer", folder / "online"
    _run([cc, *flags, "-o", str(observer), str(HERE / "observer.c")])
    bench = ROOT / "cli" / "valve_cli" / "bench"
    include = ROOT / "runtime" / "native" / "include"
    _run([cc, *flags, f"-I{bench}", f"-I{include}", "-o", str(online), str(bench / "online.c"), "-ldl"])
    kernels = ""
    if not machine.is_fake:
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if nvcc is None:
            raise Skip("nvcc is missing: install the CUDA toolkit, or put it on PATH")
        kernels = str(folder / "kernels.cubin")
        _run([nvcc, "-cubin", f"-arch=sm_{capability()}", "-O2", "-o", kernels, str(HERE / "kernels.cu")])
    return Tools(libvalve, observer, online, kernels)


def commit(environ: Mapping[str, str]) -> str:
    """The tree's commit, with `+` where it was changed since; VALVE_COMMIT where there is no repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return environ.get("VALVE_COMMIT", "unknown")


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _runtime_build() -> ModuleType:
    """runtime/build.py is a program of its own, not a package."""
    spec = importlib.util.spec_from_file_location("valve_runtime_build", ROOT / "runtime" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skip(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


def _libcuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Skip(f"{error}: install the driver's user-space libraries") from error


def cores() -> int:
    return len(os.sched_getaffinity(0))
