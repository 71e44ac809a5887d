# SPDX-License-Identifier: Apache-2.0
"""The cache of the cluster's programs: what changes its keys, and that a build is whole or absent."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from e2e.cluster import build
from e2e.cluster.errors import BuildError

GROUP = build.Group("tool", ("example.org/tool@v1.0.0",))
FAKE_GO = """#!/bin/sh
echo run >> {count}
sleep 0.2
{extra}
echo program > "$GOBIN/tool"
"""


def fake_go(folder: Path, extra: str = "") -> tuple[str, Path]:
    go, count = folder / "go", folder / "count"
    go.write_text(FAKE_GO.format(count=count, extra=extra))
    go.chmod(0o755)
    return str(go), count


@pytest.mark.parametrize(
    ("description", "changed", "go_version"),
    [
        ("another version", replace(GROUP, installs=("example.org/tool@v1.0.1",)), "go1.26.8"),
        ("other tags", replace(GROUP, tags="no_btrfs"), "go1.26.8"),
        ("other linker flags", replace(GROUP, ldflags=()), "go1.26.8"),
        ("another Go", GROUP, "go1.27.0"),
    ],
)
def test_a_key_changes_with_every_input(description: str, changed: build.Group, go_version: str) -> None:
    assert build.key(changed, go_version) != build.key(GROUP, "go1.26.8"), description


def test_a_key_changes_with_go_sum(tmp_path: Path) -> None:
    group = build.Group("kube", module=tmp_path)
    (tmp_path / "go.sum").write_text("a\n")
    before = build.key(group, "go1.26.8")
    (tmp_path / "go.sum").write_text("b\n")
    assert build.key(group, "go1.26.8") != before


def test_two_checkouts_at_once_build_once(tmp_path: Path) -> None:
    go, count = fake_go(tmp_path)
    homes: list[Path] = []
    threads = [
        threading.Thread(target=lambda: homes.append(build.build(GROUP, tmp_path / "cache", go, "go1.26.8")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(homes)) == 1
    assert (homes[0] / "tool").read_text() == "program\n"
    assert count.read_text() == "run\n"


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    go, _ = fake_go(tmp_path, extra='echo "no such module" >&2; exit 1')
    with pytest.raises(BuildError, match=r"(?s)example.org/tool@v1.0.0 failed.*no such module"):
        build.build(GROUP, tmp_path / "cache", go, "go1.26.8")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tool.lock"]


def test_the_kubernetes_version_is_the_one_required() -> None:
    text = "module x\nrequire (\n\tk8s.io/kubectl v0.0.0\n\tk8s.io/kubernetes v1.36.3\n)\n"
    assert build.kubernetes_version(text) == "v1.36.3"
    assert "-X=k8s.io/component-base/version.gitMinor=36" in build.kubernetes_stamps("v1.36.3")
