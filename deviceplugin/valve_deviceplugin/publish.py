# SPDX-License-Identifier: Apache-2.0
"""The allocations socket: whoever connects gets the ledger, fresh from the kubelet, and the end of the file.

Why it exists: the node agent asks when a process of a new container connects, which may be before the next
regular look at the kubelet's list. Root only: the socket has mode 0600 in a folder of mode 0700.

Threading model: one thread, one client at a time. Callers: main.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from pathlib import Path

from valve_deviceplugin.errors import KubeletError, StoreError
from valve_deviceplugin.state import Node
from valve_deviceplugin.watchers import Reconciler

NAME = "allocations.sock"
CLIENT_TIMEOUT_S = 2.0


class AllocationsSocket:
    def __init__(self, folder: Path, node: Node, reconciler: Reconciler) -> None:
        """Raises StoreError."""
        self._node, self._reconciler = node, reconciler
        self.path = folder / NAME
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.path.unlink(missing_ok=True)
            mask = os.umask(0o177)
            try:
                self._listener.bind(str(self.path))
            finally:
                os.umask(mask)
            self._listener.listen(64)
            self._listener.setblocking(False)
        except OSError as error:
            self._listener.close()
            raise StoreError(f"cannot listen at {self.path}: {error.strerror or error}") from error
        self._ended, self._end = os.pipe()
        self._thread = threading.Thread(target=self._loop, name="allocations", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        os.close(self._end)
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
        os.close(self._ended)
        self.path.unlink(missing_ok=True)

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._ended, select.POLLHUP)
        while True:
            if any(handle == self._ended for handle, _ in poll.poll()):
                return
            try:
                client, _ = self._listener.accept()
            except OSError:
                continue
            with client:
                self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        with contextlib.suppress(KubeletError):  # said by the reconciler; what we know is better than nothing
            self._reconciler.look(time.monotonic())
        try:
            client.settimeout(CLIENT_TIMEOUT_S)
            client.sendall(json.dumps(self._node.document()).encode())
        except OSError:
            return
