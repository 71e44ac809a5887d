# SPDX-License-Identifier: Apache-2.0
"""Builds what Valve puts into a pod: libvalve and the engine plugins, as one folder.

    python3 runtime/build.py [--out build/runtime] [--sanitize address|thread]

    OUT/lib/libvalve-VERSION.so                          LD_PRELOAD this
    OUT/python/valve_runtime/                            put OUT/python on PYTHONPATH
    OUT/python/valve_runtime-VERSION.dist-info/          makes engines find the plugins

Standard library only: it runs with the system's Python, before anything is installed. The library's
name carries its version and a running process may have the old file mapped, so files are written
beside their place and renamed, never changed in place. Nothing is done when no source has changed.
Prints the library's path. Callers: Makefile, tests.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

RUNTIME = Path(__file__).resolve().parent
NATIVE = RUNTIME / "native"
PLUGINS = RUNTIME / "valve_runtime"
PYPROJECT = RUNTIME.parent / "pyproject.toml"

CFLAGS = (
    "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O2", "-g", "-fPIC", "-fvisibility=hidden",
    "-fno-stack-protector", "-fno-strict-aliasing", "-pthread",
)  # fmt: skip
LDFLAGS = ("-shared", "-Wl,-z,now", "-Wl,-z,relro", "-Wl,-z,defs", "-Wl,-z,noexecstack")
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    # ThreadSanitizer does not know processes that share memory: the helper becomes a thread.
    "thread": ("-fsanitize=thread", "-DVALVE_CONTROL_THREAD"),
}
ENTRY_POINTS = "[vllm.general_plugins]\nvalve = valve_runtime.vllm:register\n"


class BuildError(Exception):
    """The message is one sentence that says what to do."""


def version() -> str:
    with PYPROJECT.open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def compiler() -> str:
    """Path of a C compiler. Raises BuildError."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError(
        "no C compiler found: install one (Debian, Ubuntu: `apt-get install gcc libc6-dev`) or set CC to one"
    )


def sources() -> list[Path]:
    return sorted((NATIVE / "src").glob("*.c"))


def flags(sanitize: str | None = None) -> list[str]:
    """Compiler flags for libvalve's own sources."""
    definition = f'-DVALVE_LIBRARY_VERSION="{version()}"'
    paths = f"-ffile-prefix-map={RUNTIME.parent}=."
    return [*CFLAGS, paths, *SANITIZERS.get(sanitize or "", ()), definition, f"-I{NATIVE / 'include'}"]


def digest(cc: str, sanitize: str | None) -> str:
    """Changes when anything does that the bundle is made from."""
    state = hashlib.sha256()
    inputs = [*NATIVE.rglob("*.[ch]"), *PLUGINS.rglob("*.py"), PYPROJECT, Path(__file__)]
    for path in sorted(inputs):
        state.update(f"{path.relative_to(RUNTIME.parent)}\0".encode())
        state.update(path.read_bytes())
    state.update(f"{cc}\0{sanitize}".encode())
    return state.hexdigest()


def build_library(cc: str, sanitize: str | None, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".building-")
    os.close(handle)
    command = [cc, *flags(sanitize), *LDFLAGS, "-o", name, *map(str, sources())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)}\nfailed:\n{done.stderr}")
        os.chmod(name, 0o755)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def build_python(out: Path, release: str) -> None:
    """The plugins and their entry points. The folder is made beside its place and swapped in."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as scratch:
        fresh = Path(scratch) / "python"
        shutil.copytree(PLUGINS, fresh / "valve_runtime", ignore=shutil.ignore_patterns("__pycache__"))
        info = fresh / f"valve_runtime-{release}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: valve-runtime\nVersion: {release}\n")
        (info / "entry_points.txt").write_text(ENTRY_POINTS)
        (info / "RECORD").write_text("")
        place = out / "python"
        if place.exists():
            place.rename(Path(scratch) / "old")
        fresh.rename(place)


def build(out: Path, sanitize: str | None = None) -> Path:
    """Make or refresh the bundle in `out`; the library's path. Raises BuildError."""
    cc = compiler()
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:  # two builds at once: the second finds everything done
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(cc, out, sanitize)


def _build(cc: str, out: Path, sanitize: str | None) -> Path:
    release = version()
    library = out / "lib" / f"libvalve-{release}.so"
    stamp = out / "built-from"
    current = digest(cc, sanitize)
    python = out / "python" / "valve_runtime"
    if library.exists() and python.exists() and stamp.exists() and stamp.read_text() == current:
        return library
    build_library(cc, sanitize, library)
    build_python(out, release)
    stamp.write_text(current)
    return library


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build libvalve and the engine plugins.")
    parser.add_argument("--out", type=Path, default=RUNTIME.parent / "build" / "runtime")
    parser.add_argument("--sanitize", choices=sorted(SANITIZERS))
    arguments = parser.parse_args(argv)
    try:
        print(build(arguments.out.resolve(), arguments.sanitize))
    except BuildError as error:
        print(f"runtime/build.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
