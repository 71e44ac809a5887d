# SPDX-License-Identifier: Apache-2.0
"""The ledger's file: written whole beside its place, synced, renamed over it.

Why it exists: an Allocate that the kubelet remembers must be remembered here too, over a crash and a
reboot. A reader sees the old document or the new one, never half of either.

Threading model: state.py calls it under its lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from valve_deviceplugin.errors import StoreError

NAME = "allocations.json"


def write_atomically(path: Path, data: bytes, mode: int) -> None:
    """Raises OSError. Nothing is left beside the file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Store:
    def __init__(self, folder: Path) -> None:
        """Raises StoreError if the folder cannot be made."""
        self.path = folder / NAME
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"--state-dir {folder} cannot be made: {error.strerror}") from error

    def load(self) -> Any:
        """The document; None if there is none. Raises StoreError."""
        try:
            return json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error

    def save(self, document: Mapping[str, Any]) -> None:
        """Raises StoreError."""
        try:
            write_atomically(self.path, json.dumps(document, indent=1).encode(), 0o600)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def set_aside(self) -> Path:
        """Move a file that cannot be used out of the way, and keep it. Raises StoreError."""
        aside = self.path.with_suffix(".unreadable")
        try:
            os.replace(self.path, aside)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be moved to {aside}: {error.strerror}") from error
        return aside
