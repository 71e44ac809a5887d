# SPDX-License-Identifier: Apache-2.0
"""The runtime on the node: whole or not there, never changed, kept while somebody mounts it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from valve_deviceplugin import install
from valve_deviceplugin.allocator import document
from valve_deviceplugin.allocator.ledger import Entry, Ledger
from valve_deviceplugin.errors import InstallError
from valve_deviceplugin.main import main
from valve_deviceplugin.store import Store


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", "0.1.0")


def make_bundle(folder: Path, version: str, content: str = "ELF") -> Path:
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / f"libvalve-{version}.so").write_text(content)
    plugins = folder / "python" / "valve_runtime"
    (plugins / "__pycache__").mkdir(parents=True)
    (plugins / "__init__.py").write_text("")
    (plugins / "__pycache__" / "x.pyc").write_text("")
    (folder / "built-from").write_text("abc")
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_version_is_installed_whole(bundle: Path, tmp_path: Path) -> None:
    to = tmp_path / "opt"
    place = install.install(bundle, to, seen_as="/opt/valve")
    assert place == to / "0.1.0"
    assert tree(place) == {
        "ld.so.preload": "/opt/valve/0.1.0/lib/libvalve-0.1.0.so\n",
        "lib/libvalve-0.1.0.so": "ELF",
        "python/valve_runtime/__init__.py": "",
    }
    assert place.stat().st_mode & 0o777 == 0o755, "any user of a container reads it"
    assert (place / "python/valve_runtime/__init__.py").stat().st_mode & 0o777 == 0o644


def test_a_second_time_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    place = install.install(bundle, tmp_path / "opt")
    inode = (place / "lib/libvalve-0.1.0.so").stat().st_ino
    assert install.install(bundle, tmp_path / "opt") == place
    assert (place / "lib/libvalve-0.1.0.so").stat().st_ino == inode


def test_another_build_of_a_version_is_refused(bundle: Path, tmp_path: Path) -> None:
    place = install.install(bundle, tmp_path / "opt")
    before = tree(place)
    other = make_bundle(tmp_path / "other", "0.1.0", "another")
    with pytest.raises(InstallError, match="never changed"):
        install.install(other, tmp_path / "opt")
    assert tree(place) == before
    assert install.install(other, tmp_path / "opt", name="0.1.0-2").name == "0.1.0-2"


def test_an_install_that_dies_leaves_no_version(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one removes what it left."""
    to = tmp_path / "opt"
    monkeypatch.setattr(
        os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InstallError, match="No space left"):
        install.install(bundle, to)
    assert [path.name for path in to.iterdir()] == [".lock"]
    (to / ".installing-killed").mkdir()
    monkeypatch.undo()
    install.install(bundle, to)
    assert sorted(path.name for path in to.iterdir()) == [".lock", "0.1.0"]


@pytest.mark.parametrize(
    ("description", "break_it", "sentence"),
    [
        ("no library", lambda b: (b / "lib" / "libvalve-0.1.0.so").unlink(), "it holds none"),
        ("two libraries", lambda b: (b / "lib" / "libvalve-2.so").write_text(""), "must hold one"),
        ("no plugins", lambda b: (b / "python").rename(b / "nothing"), "no python/valve_runtime"),
    ],
)
def test_a_bundle_that_is_not_one(bundle: Path, tmp_path: Path, description: str, break_it, sentence) -> None:  # type: ignore[no-untyped-def]
    break_it(bundle)
    with pytest.raises(InstallError, match=sentence):
        install.install(bundle, tmp_path / "opt")


def test_prune_keeps_what_the_ledger_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The current version and those that containers mount stay; foreign folders are not ours."""
    to, state = tmp_path / "opt", tmp_path / "state"
    for version in ("1", "2", "3"):
        install.install(make_bundle(tmp_path / version, version), to)
    (to / "foreign").mkdir()
    ledger = Ledger([Entry(1, "memory", ("A",), 1, frozenset({"a-0000"}), library="/opt/valve/2")])
    Store(state).save(document.write(ledger, []))
    bundle = str(tmp_path / "3")
    assert (
        main(["install-runtime", "--from", bundle, "--to", str(to), "--prune", "--state-dir", str(state)])
        == 0
    )
    assert sorted(path.name for path in to.iterdir()) == [".lock", "2", "3", "foreign"]
    assert capsys.readouterr().out.splitlines() == [str(to / "3"), "removed 1"]


def test_nothing_is_pruned_where_use_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to, state = tmp_path / "opt", tmp_path / "state"
    install.install(make_bundle(tmp_path / "1", "1"), to)
    state.mkdir()
    (state / "allocations.json").write_text("not JSON")
    two = make_bundle(tmp_path / "2", "2")
    arguments = ["install-runtime", "--from", str(two), "--to", str(to), "--prune", "--state-dir", str(state)]
    assert main(arguments) == 2
    assert "nothing is pruned" in capsys.readouterr().err
    assert (to / "1").is_dir()
