# SPDX-License-Identifier: Apache-2.0
"""Builds the cluster's programs from Go modules, once per machine.

    python -m e2e.cluster.build [--cache ~/.cache/valve] [--link build/cluster]

    CACHE/cluster/NAME-KEY/     one folder per group, named by its inputs (go.mod, go.sum, source, versions,
                                flags, Go's version); renamed into place when whole, so a folder that exists
                                is complete
    LINK/NAME                   a symbolic link to each

About eight minutes on two cores the first time, nothing afterwards. A lock file makes a second checkout
that builds at the same time wait for the first. Caller: the Makefile's `cluster` target; the classes of
this package only read LINK.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from e2e.cluster.errors import BuildError, ClusterError, MissingError

HERE = Path(__file__).resolve().parent
LINK = HERE.parents[1] / "build" / "cluster"
RECIPE = "1"
"""Bump when the steps below change what lands in the cache."""
GO_AT_LEAST = (1, 26)
CONTAINERD = "github.com/containerd/containerd/v2/cmd"


@dataclass(frozen=True)
class Group:
    """Programs that are built, keyed and cached together.

    installs  `package@version`, each built alone with the versions its own go.mod asks for
    module    or a folder with an own go.mod whose main package becomes a program called `name`
    """

    name: str
    installs: tuple[str, ...] = ()
    module: Path | None = None
    tags: str = ""
    ldflags: tuple[str, ...] = field(default=("-s", "-w"))


def kubernetes_version(go_mod: str) -> str:
    """The version of k8s.io/kubernetes that a go.mod requires."""
    for line in go_mod.splitlines():
        words = line.split()
        if "k8s.io/kubernetes" in words:
            return words[words.index("k8s.io/kubernetes") + 1]
    raise BuildError("e2e/cluster/kube/go.mod requires no k8s.io/kubernetes: restore that line")


def kubernetes_stamps(version: str) -> Iterator[str]:
    """Linker flags that tell the programs their own version; without them they say v0.0.0-master."""
    major, minor = version.removeprefix("v").split(".")[:2]
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
        for name, value in values.items():
            yield f"-X={package}.{name}={value}"


def groups() -> tuple[Group, ...]:
    kube = HERE / "kube"
    stamps = kubernetes_stamps(kubernetes_version((kube / "go.mod").read_text()))
    commands = ("containerd", "containerd-shim-runc-v2", "ctr")
    return (
        Group("kube", module=kube, ldflags=("-s", "-w", *stamps)),
        Group(
            "containerd",
            tuple(f"{CONTAINERD}/{command}@v2.2.7" for command in commands),
            tags="no_btrfs,no_zfs,no_devmapper,no_aufs",
            ldflags=("-s", "-w", "-X=github.com/containerd/containerd/v2/version.Version=v2.2.7"),
        ),
        Group("helm", ("helm.sh/helm/v4/cmd/helm@v4.2.4",)),
        Group("kubeconform", ("github.com/yannh/kubeconform/cmd/kubeconform@v0.7.0",)),
        Group("kube-score", ("github.com/zegl/kube-score/cmd/kube-score@v1.20.0",)),
    )


def find_go() -> tuple[str, str]:
    """The go command and its version (`go1.26.8`). Raises MissingError."""
    go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    wanted = ".".join(map(str, GO_AT_LEAST))
    if go is None:
        raise MissingError(
            f"the test cluster is built with Go {wanted} or newer: install it and put it on PATH"
        )
    version = subprocess.run(
        [go, "env", "GOVERSION"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if tuple(int(part) for part in version.removeprefix("go").split(".")[:2]) < GO_AT_LEAST:
        raise MissingError(
            f"the test cluster needs Go {wanted} or newer; {go} is {version}: install a newer one"
        )
    return go, version


def key(group: Group, go_version: str) -> str:
    state = hashlib.sha256()
    for text in (RECIPE, go_version, os.uname().machine, *group.installs, group.tags, *group.ldflags):
        state.update(text.encode() + b"\0")
    if group.module:
        for file in sorted(group.module.iterdir()):
            state.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return state.hexdigest()[:12]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file of the cache; the kernel drops it if we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(group: Group, cache: Path, go: str, go_version: str) -> Path:
    """The folder that holds the group's programs, built if need be. Raises BuildError."""
    home = cache / f"{group.name}-{key(group, go_version)}"
    if home.exists():
        return home
    with locked(cache / f"{group.name}.lock"):
        if not home.exists():
            print(f"building {group.name} with {go_version} into {home}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{group.name}-") as fresh:
                _compile(group, Path(fresh) / "bin", go)
                (Path(fresh) / "bin").rename(home)
    return home


def _compile(group: Group, out: Path, go: str) -> None:
    out.mkdir()
    flags = ["-trimpath", "-buildvcs=false", f"-ldflags={' '.join(group.ldflags)}"]
    if group.tags:
        flags.append(f"-tags={group.tags}")
    environment = os.environ | {"CGO_ENABLED": "0", "GOBIN": str(out), "GOWORK": "off"}
    if group.module:
        commands = [[go, "build", *flags, "-o", str(out / group.name), "."]]
    else:
        commands = [[go, "install", *flags, package] for package in group.installs]
    for command in commands:
        done = subprocess.run(
            command, cwd=group.module or out, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BuildError(
                f"{' '.join(command)} failed (a Go module proxy must be reachable the first time):\n"
                f"{done.stderr[-4000:]}"
            )


def link(target: Path, place: Path) -> None:
    """Make `place` a symbolic link to `target`, replacing an older link at once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}-{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(place)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "valve"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the test cluster's programs.")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--link", type=Path, default=LINK)
    parser.add_argument("names", nargs="*", help="groups to build (default: all)")
    arguments = parser.parse_args(argv)
    cache = arguments.cache.expanduser().resolve() / "cluster"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        go, go_version = find_go()
        for group in groups():
            if not arguments.names or group.name in arguments.names:
                link(build(group, cache, go, go_version), arguments.link / group.name)
    except ClusterError as error:
        print(f"e2e/cluster/build.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
