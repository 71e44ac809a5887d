# SPDX-License-Identifier: Apache-2.0
"""A process of the qualification that does what a part tells it: victim, neighbour, stranger.

    python3 -S actor.py FD

Each packet on the socket FD is Python code, run in one namespace that has `Cuda`; it answers with the value
of `result`, or the traceback. `Background(call)` runs what may block in a thread of its own. Descriptors
arrive in `fds` and leave by `give`.

Threading model: the main thread obeys; background calls are threads. Started by rig.py.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2] / "node_agent")]

from qualification.cuda import Cuda, CudaError  # noqa: E402


class Background:
    """A call in a thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.value: object = None
        self.error: str | None = None
        self.took_s: float | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            self.value = call()
        except Exception:  # noqa: BLE001 -- whoever asks gets it
            self.error = traceback.format_exc()
        self.took_s = time.monotonic() - began

    def done(self, wait_s: float = 0) -> bool:
        self._thread.join(wait_s)
        return not self._thread.is_alive()


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    names: dict[str, object] = {"Cuda": Cuda, "CudaError": CudaError, "Background": Background, "time": time}
    while True:
        code, fds, _, _ = socket.recv_fds(link, 1 << 18, 8)
        if not code:
            return
        names.update(result=None, give=[], fds=fds)
        try:
            exec(compile(code, "<part>", "exec"), names)
            answer: dict[str, object] = {"result": names["result"]}
        except Exception:  # noqa: BLE001 -- the part gets it
            names["give"] = []
            answer = {"error": traceback.format_exc()}
        given = names["give"]
        assert isinstance(given, list)
        socket.send_fds(link, [json.dumps(answer).encode()], given)


if __name__ == "__main__":
    main()
