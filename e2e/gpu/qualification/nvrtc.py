# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels.cu with NVRTC, CUDA's compiler as a library, to what cuModuleLoadData takes: a cubin.

Why it exists: a machine may have torch and no nvcc, and torch brings NVRTC along. The native lane compiles
the kernels by it for every architecture in question, without a GPU.

Threading model: none. Callers: machine.py, tests/native/fakenv/test_kernels.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qualification.record import Skip

FLAGS = ("--std=c++17",)
_NAME = re.compile(r"libnvrtc\.so\.(\d+)[\d.]*")
_FOLDERS = ("/usr/local/cuda/lib64", "/usr/local/cuda/targets/*/lib", "/opt/cuda/lib64")
_IN_PACKAGES = ("nvidia/cu[0-9]*/lib", "nvidia/cuda_nvrtc/lib")
_SONAMES = tuple(f"libnvrtc.so.{major}" for major in (13, 12))


def find(packages: Sequence[str] = ()) -> list[Path]:
    """Libraries on this machine, the newest first: beside a toolkit, in Python's packages, by name alone."""
    found = [path for folder in _FOLDERS for path in Path("/").glob(f"{folder[1:]}/libnvrtc.so.*")]
    for place in map(Path, packages or filter(None, sys.path)):
        found += [path for inside in _IN_PACKAGES for path in place.glob(f"{inside}/libnvrtc.so.*")]
    named = sorted((path for path in found if _NAME.fullmatch(path.name)), key=major, reverse=True)
    return [*named, *map(Path, _SONAMES)]


def major(library: Path) -> int:
    """13 for libnvrtc.so.13: of CUDA 13."""
    name = _NAME.fullmatch(library.name)
    return int(name.group(1)) if name else 0


class Nvrtc:
    """One loaded compiler."""

    def __init__(self, library: Path) -> None:
        """Raises Skip where it cannot be loaded."""
        try:
            self._library: Any = ctypes.CDLL(str(library))
        except OSError as error:
            raise Skip(str(error)) from error
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        numbers = [ctypes.c_int(), ctypes.c_int()]
        self._call("nvrtcVersion", *map(ctypes.byref, numbers))
        self.version = ".".join(str(number.value) for number in numbers)

    def compile(self, source: Path, architecture: str) -> tuple[bytes, str]:
        """(cubin, PTX) for an architecture as 'sm_90'. Raises Skip with the compiler's own words."""
        with self._program(source) as program:
            options = [f"--gpu-architecture={architecture}", *FLAGS]
            words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
            code = self._library.nvrtcCompileProgram(program, len(options), words)
            if code:
                said = self._get(program, "nvrtcGetProgramLog").decode(errors="replace").strip("\0\n ")
                raise Skip(f"NVRTC {self.version} for {architecture}: {self._name(code)}: {said}")
            cubin, ptx = self._get(program, "nvrtcGetCUBIN"), self._get(program, "nvrtcGetPTX")
            return cubin, ptx.rstrip(b"\0").decode()

    @contextlib.contextmanager
    def _program(self, source: Path) -> Iterator[ctypes.c_void_p]:
        program = ctypes.c_void_p()
        text, name = source.read_bytes(), source.name.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text, name, 0, None, None)
        try:
            yield program
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, function: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(function, program, data)
        return data.raw

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            raise Skip(f"{function}: {self._name(code)}")

    def _name(self, code: int) -> str:
        return str(self._library.nvrtcGetErrorString(code).decode())
