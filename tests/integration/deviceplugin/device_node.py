# SPDX-License-Identifier: Apache-2.0
"""What stands around the plugin process in these tests: an agent that says what it is told, and the process.

Threading model: the agent answers from one thread of its own; tests change `gpus` at any time.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GIB = 1 << 30
GPU_A = "GPU-aaaaaaaa-0000-4000-8000-000000000001"
GPU_B = "GPU-bbbbbbbb-0000-4000-8000-000000000002"


class FakeAgent:
    """Answers at a status socket with what `gpus` says: id -> (GiB, GiB lendable, online tenants)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gpus: dict[str, tuple[int, int, int]] = {}
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        address = self.path.with_name(self.path.name + ".status")
        address.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(address))
        address.chmod(0o600)
        self._listener.listen()
        self._thread = threading.Thread(target=self._loop, args=(self._listener,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._listener is not None and self._thread is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._listener.close()
            self._listener = None

    def _loop(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.sendall(json.dumps(self._document()).encode())

    def _document(self) -> dict[str, Any]:
        return {
            "schema": "valve.io/status/v1",
            "gpus": [
                {
                    "id": gpu, "memory_bytes": units * GIB, "lendable_bytes": lendable * GIB,
                    "online_tenants": online,
                }
                for gpu, (units, lendable, online) in self.gpus.items()
            ],
        }  # fmt: skip


class Plugin:
    """`python -m valve_deviceplugin` as a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.log = folder / "plugin.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str, through: Sequence[str] = ()) -> None:
        """through: a command that runs the plugin."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *through, sys.executable, "-m", "valve_deviceplugin", "--library", "/opt/valve/0.1.0",
                    "--agent-socket", str(self.folder / "run" / "agent.sock"),
                    "--kubelet-dir", str(self.folder / "kubelet"), "--state-dir", str(self.state),
                    "--stand", "0.5", "--grace", "3", "--gone-after", "0.5", "--release-after", "1", *options,
                ],
                stderr=log,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(20)
        finally:
            process.kill()
            process.wait()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def allocations(self) -> dict[str, Any]:
        """What the allocations socket says."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(20)
            client.connect(str(self.state / "allocations.sock"))
            data = b""
            while chunk := client.recv(1 << 16):
                data += chunk
        document: dict[str, Any] = json.loads(data)
        return document


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())
