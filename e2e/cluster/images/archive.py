# SPDX-License-Identifier: Apache-2.0
"""Writes container images as docker-archive tars: for `ctr images import`, `docker load`, `kind load`.

No registry and no docker daemon: an image is a tar of three things, a config, the layers and a manifest
that names them. Equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.cluster.errors import BuildError

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Config:
    """What a Dockerfile says besides files; see the OCI image spec for the meaning."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    directory: str = "/"
    labels: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return {
            "Entrypoint": list(self.entrypoint), "Cmd": list(self.command), "User": self.user,
            "Env": [f"{name}={value}" for name, value in self.environment.items()],
            "WorkingDir": self.directory, "Labels": dict(self.labels),
        }  # fmt: skip


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Owned by root and without a time of its own, so that equal files make equal layers."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


class Layer:
    """One layer, written to a tar file on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by `close`

    def file(self, target: str, content: bytes | Path, mode: int = 0o755) -> None:
        data = content if isinstance(content, bytes) else content.read_bytes()
        member = _plain(tarfile.TarInfo(target.lstrip("/")))
        member.size, member.mode = len(data), mode
        self._tar.addfile(member, io.BytesIO(data))

    def directory(self, target: str, mode: int = 0o755) -> None:
        member = _plain(tarfile.TarInfo(target.strip("/")))
        member.type, member.mode = tarfile.DIRTYPE, mode
        self._tar.addfile(member)

    def link(self, target: str, to: str) -> None:
        member = _plain(tarfile.TarInfo(target.lstrip("/")))
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, to, 0o777
        self._tar.addfile(member)

    def tree(self, source: Path, target: str, leave_out: Iterable[str] = ()) -> None:
        """Everything below `source`, in a stable order; `leave_out` are names that are skipped anywhere."""
        skipped = frozenset(leave_out)
        for path in sorted(source.rglob("*")):
            if not skipped.intersection(path.relative_to(source).parts):
                self._tar.add(
                    path,
                    f"{target.strip('/')}/{path.relative_to(source)}".lstrip("/"),
                    recursive=False,
                    filter=_plain,
                )

    def close(self) -> Path:
        self._tar.close()
        return self.path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, name: str, layers: list[Path], config: Config) -> Path:
    """Write one image; as `write_all`."""
    return write_all(path, {name: (layers, config)})


def write_all(path: Path, images: Mapping[str, tuple[list[Path], Config]]) -> Path:
    """Write images (`registry/repository:tag` -> uncompressed layers, config) into one archive, atomically.

    Layers that several images share are written once.
    """
    digests: dict[Path, str] = {}
    described: dict[str, bytes] = {}
    manifest = []
    for name, (layers, config) in images.items():
        if ":" not in name.rsplit("/", 1)[-1]:
            raise BuildError(f"the image name {name} has no tag: write {name}:TAG")
        for layer in layers:
            if layer not in digests:
                digests[layer] = _digest(layer)
        document = json.dumps({
            "architecture": MACHINES.get(os.uname().machine, os.uname().machine), "os": "linux",
            "config": config.json(),
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digests[layer]}" for layer in layers]},
        }).encode()  # fmt: skip
        config_name = hashlib.sha256(document).hexdigest() + ".json"
        described[config_name] = document
        members = [f"{digests[layer]}.tar" for layer in layers]
        manifest.append({"Config": config_name, "RepoTags": [name], "Layers": members})
    fresh = path.with_name(f".{path.name}.fresh")
    with tarfile.open(fresh, "w") as tar:
        for layer, digest in digests.items():
            tar.add(layer, f"{digest}.tar", filter=_plain)
        for member_name, data in (*described.items(), ("manifest.json", json.dumps(manifest).encode())):
            member = tarfile.TarInfo(member_name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    fresh.replace(path)
    return path
