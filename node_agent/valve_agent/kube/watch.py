# SPDX-License-Identifier: Apache-2.0
"""Follow one object of the API server for as long as the process lives.

Why it exists: settings must arrive within a second of a change, and the API server may be away for minutes.
What was seen last stays in force; nobody waits for the network but this thread.

Level-triggered: `seen` gets the object as it is now, however many changes lie between; every watch ends
after a minute at most, one that falls silent is given up, and after any trouble the object is listed again.

Threading model: one daemon thread per watch; `seen` is called in it. Callers: kube/node.py.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from valve_agent.kube.api import Api, Expired, KubeError

RETRY_S = (0.5, 10.0)
"""First and longest wait after trouble; it doubles in between, and varies so that a fleet does not return at
one moment."""


class ObjectWatch:
    def __init__(self, api: Api, path: str, name: str, seen: Callable[[dict[str, Any] | None], None]) -> None:
        """`path` of the collection. `seen(None)`: there is no such object."""
        self.error = ""
        """Why nothing can be heard now; empty while the watch stands."""
        self._api = api
        self._path = path
        self._query = {"fieldSelector": f"metadata.name={name}"}
        self._seen = seen
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="valve-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """The thread ends by itself; it may be waiting for the server, and holds nothing."""
        self._closing.set()

    def _loop(self) -> None:
        try:
            self._follow()
        finally:  # an error of ours: its traceback is on stderr, and metrics must not say that all is well
            self.error = "the watch has ended; restart the agent, and report what its log says"

    def _follow(self) -> None:
        wait_s = RETRY_S[0]
        while not self._closing.is_set():
            try:
                version = self._list()
                wait_s = RETRY_S[0]
                while not self._closing.is_set():
                    version = self._watch(version)
            except Expired:
                continue
            except KubeError as error:
                self.error = str(error)
                self._closing.wait(wait_s * random.uniform(0.5, 1.5))
                wait_s = min(RETRY_S[1], 2 * wait_s)

    def _list(self) -> str:
        listing = self._api.get(self._path, self._query)
        items = listing.get("items") or [None]
        self.error = ""
        self._seen(items[0])
        return str(listing["metadata"]["resourceVersion"])

    def _watch(self, version: str) -> str:
        """One watch from `version` on; returns where the next one goes on."""
        for event in self._api.watch(self._path, {**self._query, "resourceVersion": version}):
            item = event["object"]
            version = str(item["metadata"]["resourceVersion"])
            if event["type"] == "DELETED":
                self._seen(None)
            elif event["type"] != "BOOKMARK":
                self._seen(item)
            if self._closing.is_set():
                break
        return version
