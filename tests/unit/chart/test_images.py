# SPDX-License-Identifier: Apache-2.0
"""The Dockerfiles: replaceable bases, sources that reach the build, and every import among the requirements.

Gap: nothing is built here; the e2e images are made of the same sources and requirements.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
IMAGES = {path.parent.name: path for path in sorted((ROOT / "images").glob("*/Dockerfile"))}
EACH = pytest.mark.parametrize("image", IMAGES)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
PROGRAMS = {
    "operator": "valve_operator.main",
    "agent": "valve_agent.main",
    "device-plugin": "valve_deviceplugin.main",
}
DISTRIBUTIONS = {
    "google": "protobuf",
    "grpc": "grpcio",
    "prometheus_client": "prometheus-client",
    "pydantic_core": "pydantic",
    "pynvml": "nvidia-ml-py",
    "yaml": "pyyaml",
}
"""Import name -> distribution, where they differ."""


def instructions(image: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", IMAGES[image].read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def requirements(image: str) -> set[str]:
    text = (ROOT / "images" / image / "requirements.txt").read_text()
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def test_every_component_has_an_image_and_the_chart_names_it() -> None:
    values = yaml.safe_load((ROOT / "charts/valve/values.yaml").read_text())
    named = {values[part]["image"]["repository"] for part in ("operator", "agent", "devicePlugin")}
    assert named == {f"valve-{image}" for image in IMAGES}


@EACH
def test_the_base_can_be_replaced(image: str) -> None:
    found = instructions(image)
    first = [word for word, _ in found].index("FROM")
    arguments = [rest.partition("=")[0] for word, rest in found[:first] if word == "ARG"]
    assert {"BASE", "BUILD"} <= set(arguments)
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert set(bases) <= {f"${{{name}}}" for name in arguments}
    assert bases[-1] == "${BASE}"


@EACH
def test_what_is_copied_is_there_and_is_sent_to_the_build(image: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    sources = [
        source
        for word, rest in instructions(image)
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert sources
    for source in [*sources, *PACKAGES.values()]:
        assert (ROOT / source).exists(), source
        assert source == "." or any(source == top or source.startswith(f"{top}/") for top in allowed), source


@EACH
def test_only_the_nodes_programs_are_root(image: str) -> None:
    user = [rest for word, rest in instructions(image) if word == "USER"][-1]
    assert user == ("65532:65532" if image == "operator" else "0:0")


@EACH
def test_versions_are_pinned(image: str) -> None:
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints/dev.txt").read_text().splitlines()
    }
    assert requirements(image) <= pinned


def imports_of(module: str, seen: set[str]) -> set[str]:
    """Top-level third-party imports of a module of ours and of all of ours that it reaches."""
    if module in seen:
        return set()
    seen.add(module)
    top, _, rest = module.partition(".")
    base = ROOT / PACKAGES[top] / rest.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.exists():
        return set()  # `from package import name` where name is no module
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            head = name.partition(".")[0]
            if head in PACKAGES:
                found |= imports_of(name, seen)
            elif head not in sys.stdlib_module_names:
                found.add(DISTRIBUTIONS.get(head, head))
    return found


@EACH
def test_requirements_are_what_the_program_imports(image: str) -> None:
    assert imports_of(PROGRAMS[image], set()) == requirements(image)
