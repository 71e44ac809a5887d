# SPDX-License-Identifier: Apache-2.0
"""The few calls that Valve's node agent and command line make to a Kubernetes API server.

Why it exists: the agent is Valve's only privileged process and makes three kinds of request. The official
client costs it 43 MB and brings watches that are known to stall silently; this is the standard library, and
every wait in it has an end.

Threading model: an `Api` may be used by several threads; each request takes an idle connection or makes one.
A watch has a connection of its own. Callers: kube/node.py, kube/report.py, valve_cli.

    KubeError
    ├── CredentialsError     kubeconfig or service account cannot be used (credentials.py)
    ├── ApiUnavailable       no answer, or one that says "later": try again
    └── ApiRefused           the server refuses; `.code`, `.reason`, and its sentence
        ├── NotFound         404
        ├── Conflict         409
        ├── Expired          410: list again
        └── TooManyRequests  429: for an eviction, a disruption budget forbids it now
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlencode, urlsplit

TIMEOUT_S = 10.0
WATCH_S = 60
"""How long the server keeps one watch open; then we ask again."""
WATCH_SILENCE_S = WATCH_S + 15.0
"""A watch that says nothing for so long, not even its end, is dead."""
BODY_BYTES_MAX = 64 << 20


class KubeError(Exception):
    pass


class ApiUnavailable(KubeError):
    pass


class ApiRefused(KubeError):
    by_code: ClassVar[dict[int, type[ApiRefused]]] = {}

    def __init__(self, code: int, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.reason = reason


class NotFound(ApiRefused):
    pass


class Conflict(ApiRefused):
    pass


class Expired(ApiRefused):
    pass


class TooManyRequests(ApiRefused):
    pass


ApiRefused.by_code = {404: NotFound, 409: Conflict, 410: Expired, 429: TooManyRequests}


@dataclass(frozen=True, slots=True)
class Server:
    """Where the API server is and who we are there. Made by credentials.py."""

    url: str
    context: ssl.SSLContext | None
    """None: plain HTTP."""
    token: Callable[[], str | None]
    """Asked for every request: a mounted token is renewed every hour."""
    namespace: str = "default"


class Api:
    def __init__(self, server: Server, *, agent: str = "valve", timeout_s: float = TIMEOUT_S) -> None:
        """`agent`: the User-Agent, by which the server's audit log and fair queuing know us."""
        self.server = server
        parts = urlsplit(server.url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if server.context else 80)
        self._prefix = parts.path.rstrip("/")
        self._agent = agent
        self._timeout_s = timeout_s
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._call("GET", path, query)

    def patch(self, path: str, body: object, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A merge patch: an object's fields replace those that are there, null removes one."""
        return self._call("PATCH", path, query, body, "application/merge-patch+json")

    def post(self, path: str, body: object, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._call("POST", path, query, body)

    def watch(self, path: str, query: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Events {type, object} of one watch until the server ends it (after WATCH_S at the latest).
        Raises ApiUnavailable when it breaks or falls silent, Expired when `resourceVersion` is too old."""
        options = {
            **query, "watch": "1", "timeoutSeconds": str(WATCH_S), "allowWatchBookmarks": "true",
        }  # fmt: skip
        connection = self._connect(WATCH_SILENCE_S)
        try:
            response = self._send(connection, "GET", self._path(path, options), None, {})
            if response.status != 200:
                raise _refusal(response.status, response.read(BODY_BYTES_MAX))
            while line := response.readline():
                event: dict[str, Any] = json.loads(line)
                if event["type"] == "ERROR":
                    raise _refusal(
                        int(event["object"].get("code", 500)), json.dumps(event["object"]).encode()
                    )
                yield event
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unavailable(error) from error
        finally:
            connection.close()

    def close(self) -> None:
        """Close idle connections, and those in use as soon as their request is over."""
        with self._lock:
            self._closed = True
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: object = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": content_type}
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            reused = connection is not None
            connection = connection or self._connect(self._timeout_s)
            try:
                response = self._send(connection, method, self._path(path, query or {}), data, headers)
                answer = response.read(BODY_BYTES_MAX)
                break
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if reused and isinstance(
                    error, (http.client.RemoteDisconnected, BrokenPipeError, ssl.SSLError)
                ):
                    continue  # the server had closed it while it was idle: nothing was done yet
                raise self._unavailable(error) from error
        with self._lock:
            if response.will_close or self._closed:
                connection.close()
            else:
                self._idle.append(connection)
        if response.status >= 400:
            raise _refusal(response.status, answer)
        try:
            document = json.loads(answer)
        except ValueError as error:
            raise ApiUnavailable(f"{self.server.url} gave no JSON: is it an API server?") from error
        return document if isinstance(document, dict) else {}

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.server.context is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=timeout_s, context=self.server.context
        )

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        head = {"Accept": "application/json", "User-Agent": self._agent, **headers}
        token = self.server.token()
        if token:
            head["Authorization"] = f"Bearer {token}"
        connection.request(method, path, body=data, headers=head)
        return connection.getresponse()

    def _path(self, path: str, query: Mapping[str, str]) -> str:
        return self._prefix + path + (f"?{urlencode(query)}" if query else "")

    def _unavailable(self, error: Exception) -> ApiUnavailable:
        return ApiUnavailable(f"the API server at {self.server.url} does not answer: {error}")


def _refusal(code: int, body: bytes) -> KubeError:
    """The error for an answer of 400 and more: its Status object's sentence, or the body's first words."""
    try:
        status = json.loads(body)
        reason, sentence = str(status.get("reason") or code), str(status.get("message") or reason_of(code))
    except (ValueError, AttributeError):
        reason, sentence = str(code), body[:200].decode(errors="replace") or reason_of(code)
    if code >= 500:
        return ApiUnavailable(f"the API server answers {code}: {sentence}")
    return ApiRefused.by_code.get(code, ApiRefused)(code, reason, sentence)


def reason_of(code: int) -> str:
    return http.client.responses.get(code, "refused")
