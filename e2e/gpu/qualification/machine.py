# SPDX-License-Identifier: Apache-2.0
"""The machine under qualification: what it is, and what has to be built on it first.

Threading model: none. Callers: qualify.py, rig.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from qualification import nvrtc
from qualification.record import Clock, Skip
from valve_agent.devices.base import DeviceError
from valve_agent.devices.nvidia import rm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FAKE = "NVIDIA Fake GPU"
FAKE_DEVICE = "fake"
PART_S = 150.0
COMPILE_S = 120.0
NVCC = ("nvcc", "/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc")


@dataclass(frozen=True)
class Machine:
    device: str
    """The GPU's name, or `fake`."""
    driver: str
    branch: rm.Branch
    kernel: str
    assumed: str = ""
    """a note where nobody has checked this driver's layouts and those of `branch` are tried"""

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
    tracer: Path
    online: Path
    kernels: str
    """compiled kernels; '' on the fake driver, which takes any image"""
    clock: Clock = field(default_factory=lambda: Clock(PART_S))


def this() -> Machine:
    """Raises Skip where there is no driver. For a branch that Valve does not know the nearest older one's
    layouts are tried: the driver refuses blocks of another size, and Valve itself takes no channel route."""
    try:
        version = rm.driver_version()
    except DeviceError as error:
        raise Skip(str(error)) from error
    if version is None:
        raise Skip("there is no NVIDIA driver on this machine: run on a GPU node, or under tests/fakenv")
    branch, assumed = rm.branch_of(version), ""
    if branch is None:
        branch = _nearest(version)
        assumed = (
            f"driver {version} is of no branch that Valve knows ({', '.join(rm.BRANCHES)}): the layouts of "
            f"{branch.name} are assumed here, and Valve itself takes no channel route on this machine"
        )
    name = gpu_name()
    return Machine(FAKE_DEVICE if name == FAKE else name, version, branch, platform.release(), assumed)


def _nearest(version: str) -> rm.Branch:
    """The newest known branch that is not newer than this driver, else the oldest."""
    number = int(version.partition(".")[0])
    older = [branch for name, branch in rm.BRANCHES.items() if int(name) <= number]
    return older[-1] if older else next(iter(rm.BRANCHES.values()))


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


def cuda_version() -> int:
    """13000 for a libcuda of CUDA 13.0."""
    version = ctypes.c_int()
    _libcuda().cuDriverGetVersion(ctypes.byref(version))
    return version.value


def build(machine: Machine, folder: Path) -> Tools:
    """Everything, into `folder`. Raises Skip naming the tool that is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = _runtime_build()
    # A newer compiler's warning must not cost the machine's time.
    bundle.CFLAGS = (*bundle.CFLAGS, "-Wno-error")  # type: ignore[attr-defined]
    try:
        libvalve = bundle.build(folder / "runtime")
    except bundle.BuildError as error:
        raise Skip(str(error)) from error
    cc = bundle.compiler()
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread"]
    observer, online = folder / "observer", folder / "online"
    _make([cc, *flags], [HERE / "observer.c"], observer)
    tracer = folder / "tracer.so"
    _make([cc, *flags, "-fPIC", "-shared"], [HERE / "tracer.c"], tracer, "-ldl")
    bench = ROOT / "cli" / "valve_cli" / "bench"
    include = ROOT / "runtime" / "native" / "include"
    headers = [bench / "cycle.h", *include.glob("*.h")]
    _make([cc, *flags, f"-I{bench}", f"-I{include}"], [bench / "online.c"], online, "-ldl", headers=headers)
    return Tools(libvalve, observer, tracer, online, "" if machine.is_fake else str(_kernels(folder)))


def _kernels(folder: Path) -> Path:
    """kernels.cu for the GPU at hand, by nvcc or else by NVRTC. Raises Skip with what each of them said."""
    architecture = f"sm_{capability()}"
    source, target = HERE / "kernels.cu", folder / f"kernels-{architecture}.cubin"
    problems = []
    nvcc = next(filter(None, map(shutil.which, NVCC)), None)
    if nvcc is None:
        problems.append("nvcc is missing: install the CUDA toolkit, or put it on PATH")
    else:
        try:
            _make([nvcc, "-cubin", f"-arch={architecture}", "-O2"], [source], target)
            return target
        except Skip as problem:
            problems.append(str(problem))
    newest = cuda_version() // 1000
    for library in nvrtc.find():
        if nvrtc.major(library) > newest:
            continue  # what it makes may be too new for this driver
        try:
            target.write_bytes(nvrtc.Nvrtc(library).compile(source, architecture)[0])
            return target
        except Skip as problem:
            problems.append(str(problem))
    raise Skip("the kernels cannot be compiled: " + "; ".join(problems))


def _make(
    command: list[str], sources: list[Path], target: Path, *libraries: str, headers: Sequence[Path] = ()
) -> None:
    """Nothing where this very command has already made the target from these sources. Raises Skip."""
    words = [*command, "-o", str(target), *map(str, sources), *libraries]
    state = hashlib.sha256("\0".join(words).encode())
    for path in (*sources, *headers):
        state.update(path.read_bytes())
    stamp = target.with_name(target.name + ".from")
    if target.exists() and stamp.exists() and stamp.read_text() == state.hexdigest():
        return
    stamp.unlink(missing_ok=True)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skip(f"{' '.join(words)}: {error}") from error
    if done.returncode:
        raise Skip(f"{' '.join(words)} failed:\n{(done.stderr or done.stdout).strip()}")
    stamp.write_text(state.hexdigest())


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


def _libcuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Skip(f"{error}: install the driver's user-space libraries") from error
