# SPDX-License-Identifier: Apache-2.0
"""`install-runtime`: put one version of the runtime onto the node, where containers mount it from.

Why it exists: a running process has the library mapped and its children open it again, so a file there may
never change. A version is made whole beside its place, synced and renamed into it; one that is there is
compared, and another build under the same name is refused. Old versions stay until no entry of the ledger
names them.

    TO/VERSION/lib/libvalve-VERSION.so     TO/VERSION/python/valve_runtime/…     TO/VERSION/ld.so.preload

Threading model: one process, an init container of the DaemonSet; two at once on a node are serialised by a
lock. Callers: main.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from valve_deviceplugin.allocator import document
from valve_deviceplugin.errors import InstallError, StoreError
from valve_deviceplugin.store import Store, sync_folder

PARTS = ("lib", "python")
PRELOAD = "ld.so.preload"
_LOCK = ".lock"
_SCRATCH = ".installing-"


def bundle_library(bundle: Path) -> Path:
    """The one libvalve of a bundle (runtime/build.py). Raises InstallError."""
    found = sorted((bundle / "lib").glob("libvalve-*.so"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InstallError(f"{bundle / 'lib'} must hold one libvalve-VERSION.so; it holds {names}")
    if not (bundle / "python" / "valve_runtime").is_dir():
        raise InstallError(f"{bundle} has no python/valve_runtime: build it with runtime/build.py")
    return found[0]


def version_of(bundle: Path) -> str:
    return bundle_library(bundle).name.removeprefix("libvalve-").removesuffix(".so")


def install(bundle: Path, to: Path, *, name: str = "", seen_as: str = "") -> Path:
    """Install a bundle as `to`/`name` (default: its version) and return that folder. seen_as: where
    containers and the kubelet see `to`, if this process sees it elsewhere. Raises InstallError."""
    library = bundle_library(bundle)
    name = name or version_of(bundle)
    if "/" in name or name.startswith("."):
        raise InstallError(f"{name!r} is no name for a version: letters, digits, dots and dashes")
    place = to / name
    preload = PurePosixPath(seen_as or to) / name / "lib" / library.name
    with _locked(to):
        _remove_scratch(to)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=to))
        try:
            _fill(scratch, bundle, f"{preload}\n")
            if place.exists():
                if _digest(place) != _digest(scratch):
                    raise InstallError(
                        f"{place} holds another build of this version. Containers may have it mapped, so it "
                        f"is never changed: install this build under a name of its own (--as {name}-2), or "
                        "remove the folder when no pod of this node uses Valve"
                    )
                return place
            _sync_tree(scratch)
            os.rename(scratch, place)
            sync_folder(to)
        except OSError as error:
            raise InstallError(f"{place} cannot be made: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return place


def prune(to: Path, keep: Collection[str]) -> list[str]:
    """Remove every version not in `keep`; their names. Raises InstallError."""
    removed = []
    with _locked(to):
        for place in sorted(to.iterdir()):
            if place.name in keep or not (place / PRELOAD).is_file():
                continue
            doomed = to / f"{_SCRATCH}{place.name}"
            try:
                os.rename(place, doomed)  # nobody finds half a version
                shutil.rmtree(doomed)
            except OSError as error:
                raise InstallError(f"{place} cannot be removed: {error}") from error
            removed.append(place.name)
    return removed


def versions_in_use(state_dir: Path) -> set[str]:
    """Names of the versions that containers may mount. Raises InstallError where that cannot be known."""
    try:
        found = Store(state_dir).load()
        ledger = document.read(found)[0] if found is not None else ()
    except (StoreError, document.DocumentError) as error:
        raise InstallError(f"nothing is pruned: {error}") from error
    return {PurePosixPath(entry.library).name for entry in ledger if entry.library}


def _fill(scratch: Path, bundle: Path, preload: str) -> None:
    for part in PARTS:
        shutil.copytree(
            bundle / part, scratch / part, ignore=shutil.ignore_patterns("__pycache__", ".*"), symlinks=True
        )
    (scratch / PRELOAD).write_text(preload)
    for folder, _folders, files in os.walk(scratch):
        os.chmod(folder, 0o755)
        for file in files:
            os.chmod(Path(folder) / file, 0o644)
    for library in (scratch / "lib").iterdir():
        os.chmod(library, 0o755)


def _digest(place: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(place.rglob("*")):
        if path.is_file():
            state.update(f"{path.relative_to(place)}\0".encode())
            state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()


def _sync_tree(top: Path) -> None:
    for folder, _folders, files in os.walk(top, topdown=False):
        for file in files:
            handle = os.open(Path(folder) / file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(folder))


def _remove_scratch(to: Path) -> None:
    """What an install that was killed left behind. Under the lock, so nobody is at work in it."""
    for left in to.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(to: Path) -> Iterator[None]:
    try:
        to.mkdir(mode=0o755, parents=True, exist_ok=True)
        file = (to / _LOCK).open("w")
    except OSError as error:
        raise InstallError(f"{to} cannot be written: {error.strerror}; mount it writable") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
