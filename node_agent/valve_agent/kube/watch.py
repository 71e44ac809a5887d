# SPDX-License-Identifier: Apache-2.0
"""Follow one object of the API server for as long as the process lives.

Why it exists: settings must arrive within a second of a change, and the API server may be away for minutes.
What was seen last stays in force; nobody waits for the network but this thread.

Level-triggered: `seen` gets the object as it is now, however many changes lie between; every watch ends
after a minute at most, one that falls silent is given up, and after any trouble the object is listed again.
Trouble is also an answer that makes no sense, as a proxy gives in the server's place; what `seen` raises is
an error of ours, and ends the thread.

Threading model: one daemon thread per watch; `seen` is called in it. Callers: kube/node.py.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from valve_agent.kube.api import Api, ApiUnavailable, Expired, KubeError

RETRY_S = (0.5, 10.0)
"""First and longest wait after trouble; it doubles in between, and varies so that a fleet does not return at
one moment."""
EVENTS = ("ADDED", "MODIFIED", "DELETED", "BOOKMARK")
NONSENSE = (LookupError, TypeError, AttributeError)
"""What taking an answer apart raises where it is not of the API's shape."""


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
                    began_s = time.monotonic()
                    version = self._watch(version)
                    if time.monotonic() - began_s < RETRY_S[0]:  # no server ends a watch so soon
                        self._closing.wait(RETRY_S[0])
            except Expired:
                self._closing.wait(RETRY_S[0] * random.uniform(0.5, 1.5))
            except KubeError as error:
                self.error = str(error)
                self._closing.wait(wait_s * random.uniform(0.5, 1.5))
                wait_s = min(RETRY_S[1], 2 * wait_s)

    def _list(self) -> str:
        listing = self._api.get(self._path, self._query)
        try:
            version = _version_of(listing)
            items = listing["items"] or []  # Go writes null for none
            if items:
                _version_of(items[0])
        except NONSENSE as error:
            raise self._nonsense("list", error) from error
        self.error = ""
        self._seen(items[0] if items else None)
        return version

    def _watch(self, version: str) -> str:
        """One watch from `version` on; returns where the next one goes on."""
        for kind, item in self._events(version):
            version = _version_of(item)
            if kind == "DELETED":
                self._seen(None)
            elif kind != "BOOKMARK":
                self._seen(item)
            if self._closing.is_set():
                break
        return version

    def _events(self, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(type, object) of each event. A generator, so that what `seen` raises does not come by here."""
        try:
            for event in self._api.watch(self._path, {**self._query, "resourceVersion": version}):
                kind, item = event["type"], event["object"]
                _version_of(item)
                if kind not in EVENTS:
                    raise LookupError(f"event {kind}")
                yield kind, item
        except NONSENSE as error:
            raise self._nonsense("watch", error) from error

    def _nonsense(self, request: str, error: Exception) -> ApiUnavailable:
        return ApiUnavailable(
            f"what {self._api.server.url} answers to a {request} of {self._path} makes no sense ({error!r}): "
            "is it an API server? If so, check what stands in front of it, such as a proxy or load balancer"
        )


def _version_of(thing: dict[str, Any]) -> str:
    """Of an object or a list. Raises one of NONSENSE where it is neither."""
    version = thing["metadata"]["resourceVersion"]
    if not isinstance(version, str) or not version:
        raise TypeError(f"resourceVersion {version!r}")
    return version
