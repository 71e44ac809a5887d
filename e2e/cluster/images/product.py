# SPDX-License-Identifier: Apache-2.0
"""Valve's own images without docker: what images/*/Dockerfile say, on a base by debootstrap.

    valve.test/valve-operator, valve.test/valve-agent, valve.test/valve-device-plugin

The final stage of each Dockerfile is read for its environment, user and entrypoint, and its requirements
file for the packages, so that what runs in the tests is what ships but for the base. Three layers each: the
base (Debian with Python, no documentation; the same for all), the third-party packages as
constraints/dev.txt pins them, and this checkout's `valve` as pip installs it. The first two are made once
per machine and kept in the cache under names made from their inputs; the last costs seconds and is made
anew when a source changes.
"""

from __future__ import annotations

import compileall
import hashlib
import json
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.build import default_cache, locked
from e2e.cluster.errors import BuildError, MissingError
from e2e.cluster.images import archive
from e2e.cluster.programs import system_program

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILES = ROOT / "images"
COMPONENTS = ("operator", "agent", "device-plugin")
RECIPE = "1"
"""Bump when the steps below change what lands in the cache."""
REGISTRY = "valve.test"
SUITE, PYTHON = "bookworm", (3, 11)
"""Debian's release and its Python: wheels are chosen for that one."""
SITE = "usr/lib/valve"
"""Where the Dockerfiles put every Python package."""
BUNDLE = "usr/share/valve/runtime"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
UNWANTED = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "var/cache/apt",
    "var/lib/apt",
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "linux")


@dataclass(frozen=True)
class Component:
    """One image, as its Dockerfile's final stage describes it."""

    name: str
    config: archive.Config
    with_runtime: bool

    @property
    def requirements(self) -> Path:
        return DOCKERFILES / self.name / "requirements.txt"

    @property
    def image(self) -> str:
        return f"{REGISTRY}/valve-{self.name}:{version()}"


def component(name: str, dockerfile: str) -> Component:
    """Read a Dockerfile. Raises BuildError where it says what this module does not understand."""
    stage = re.split(r"(?m)^FROM .*$", dockerfile.replace("\\\n", " "))[-1]
    environment, user, entrypoint, with_runtime = {"PATH": PATH}, "", (), False
    for line in stage.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "ENV":
            environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif word == "USER":
            user = rest
        elif word == "ENTRYPOINT":
            entrypoint = tuple(json.loads(rest))
        elif word == "COPY":
            with_runtime |= "--from=runtime" in rest
        elif word not in ("", "#", "LABEL"):
            raise BuildError(
                f"images/{name}/Dockerfile has a {word} that e2e/cluster/images/product.py must learn"
            )
    if environment.get("PYTHONPATH") != f"/{SITE}" or not entrypoint:
        raise BuildError(f"images/{name}/Dockerfile must set PYTHONPATH=/{SITE} and an ENTRYPOINT")
    return Component(name, archive.Config(entrypoint, (), environment, user), with_runtime)


def components() -> list[Component]:
    return [component(name, (DOCKERFILES / name / "Dockerfile").read_text()) for name in COMPONENTS]


def version() -> str:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return str(described)


def build(out: Path | None = None, cache: Path | None = None) -> Path:
    """The archive of all three images, built if a source changed. Raises BuildError, MissingError.

    out    default: build/images/valve.tar of this checkout
    cache  default: the user's cache folder
    """
    out = out or ROOT / "build" / "images" / "valve.tar"
    cache = (cache or default_cache()) / "cluster" / "images"
    if not (ROOT / "build/runtime/lib").exists():
        raise MissingError("build/runtime is missing: run `make runtime`")
    out.parent.mkdir(parents=True, exist_ok=True)
    base = _cached(cache, f"base-{SUITE}", _digest([RECIPE.encode(), SUITE.encode()]), _base)
    packages = {part.name: _packages(cache, part) for part in components()}
    wanted = _digest(
        [RECIPE.encode(), *(layer.name.encode() for layer in (base, *packages.values())), *_sources()]
    )
    stamp = out.with_suffix(".key")
    if out.exists() and stamp.exists() and stamp.read_text() == wanted:
        return out
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        own, runtime = _own(Path(scratch)), _runtime(Path(scratch))
        images = {
            part.image: (
                [base, packages[part.name], own, *([runtime] if part.with_runtime else [])],
                part.config,
            )
            for part in components()
        }
        archive.write_all(out, images)
    stamp.write_text(wanted)
    return out


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:16]


def _cached(cache: Path, name: str, key: str, make: Callable[[Path], None]) -> Path:
    """A layer of the cache; `make` fills a folder with its files."""
    path = cache / f"{name}-{key}.layer"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{name}.lock"):
        if not path.exists():
            print(f"building {path}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                root = Path(scratch) / "root"
                root.mkdir()
                make(root)
                _layer(root, Path(scratch) / "layer").rename(path)
    return path


def _layer(root: Path, path: Path) -> Path:
    layer = archive.Layer(path)
    layer.tree(root, "")
    return layer.close()


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{what} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def _base(root: Path) -> None:
    include = "--include=python3,ca-certificates"
    _run([str(system_program("debootstrap")), "--variant=minbase", include, SUITE, str(root)],
         "debootstrap (a Debian mirror must be reachable the first time)")  # fmt: skip
    for place in UNWANTED:
        shutil.rmtree(root / place, ignore_errors=True)
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()
    (root / "usr/bin/python").symlink_to("python3")


def _packages(cache: Path, part: Component) -> Path:
    """The layer of third-party packages."""
    constraints = ROOT / "constraints/dev.txt"
    options = [
        "--only-binary",
        ":all:",
        "--implementation",
        "cp",
        "--python-version",
        ".".join(map(str, PYTHON)),
    ]
    for platform in PLATFORMS:
        options += ["--platform", f"{platform}_x86_64"]

    def make(root: Path) -> None:
        _run([*PIP, *options, "--target", str(root / SITE), "--constraint", str(constraints),
              "--requirement", str(part.requirements)], "pip")  # fmt: skip
        _compile(root)

    inputs = [RECIPE.encode(), constraints.read_bytes(), part.requirements.read_bytes()]
    return _cached(cache, f"packages-{part.name}", _digest(inputs), make)


def _sources() -> Iterator[bytes]:
    """What `valve` is built from, and the runtime bundle."""
    files = [ROOT / "pyproject.toml", *sorted((ROOT / "build/runtime").rglob("*"))]
    files += [DOCKERFILES / name / "Dockerfile" for name in COMPONENTS]
    for folder in _folders():
        files += sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    for file in files:
        if file.is_file():
            yield str(file.relative_to(ROOT)).encode()
            yield file.read_bytes()


def _folders() -> list[Path]:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    return [ROOT / folder for folder in described.values()]


def _own(scratch: Path) -> Path:
    """The layer with this checkout's `valve`. pip builds in a copy: it would leave folders in the tree."""
    copy, root = scratch / "copy", scratch / "root"
    for folder in _folders():
        shutil.copytree(
            folder,
            copy / folder.relative_to(ROOT),
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    target = str(root / SITE)
    _run([*PIP, "--no-deps", "--no-build-isolation", "--target", target, str(copy)], "pip install of valve")
    _compile(root)
    return _layer(root, scratch / "own.layer")


def _runtime(scratch: Path) -> Path:
    """The layer with the runtime that the device plugin installs on nodes."""
    root = scratch / "runtime"
    for part in ("lib", "python"):
        shutil.copytree(ROOT / "build/runtime" / part, root / BUNDLE / part)
    return _layer(root, scratch / "runtime.layer")


def _compile(root: Path) -> None:
    """Byte code that needs no file times: layers have none, and containers cannot write it themselves."""
    if sys.version_info[:2] == PYTHON:
        compileall.compile_dir(
            root / SITE, quiet=2, stripdir=str(root), prependdir="/", workers=1,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )  # fmt: skip
