# SPDX-License-Identifier: Apache-2.0
"""The client against a server that misbehaves in every way that API servers and networks do."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from valve_agent.kube import api as api_module
from valve_agent.kube import watch as watch_module
from valve_agent.kube.api import (
    Api,
    ApiRefused,
    ApiUnavailable,
    Conflict,
    Expired,
    NotFound,
    Server,
    TooManyRequests,
)
from valve_agent.kube.watch import ObjectWatch

Answer = tuple[int, bytes] | list[Any] | str
"""Status and body; the events of a watch; "close" or "silent"."""


class Fake:
    """Answers requests in turn from `script`; the last answer goes on for ever."""

    def __init__(self) -> None:
        self.script: list[Answer] = []
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.over = threading.Event()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fake.seen.append((self.command, self.path, dict(self.headers), body))
                answer = fake.script.pop(0) if len(fake.script) > 1 else fake.script[0]
                if answer == "close":
                    self.close_connection = True
                elif answer == "silent":
                    fake.over.wait(30)
                    self.close_connection = True
                elif isinstance(answer, list):
                    self.send_response(200)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for event in answer:
                        line = json.dumps(event).encode() + b"\n"
                        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                    self.wfile.write(b"0\r\n\r\n")
                else:
                    assert isinstance(answer, tuple)
                    self.send_response(answer[0])
                    self.send_header("Content-Length", str(len(answer[1])))
                    self.end_headers()
                    self.wfile.write(answer[1])

            do_GET = do_POST = do_PATCH = _answer

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/prefix"

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


@pytest.fixture
def client(fake: Fake) -> Iterator[Api]:
    api = Api(Server(fake.url, None, lambda: "secret"), agent="test", timeout_s=5.0)
    yield api
    api.close()


def status(reason: str, message: str) -> bytes:
    return json.dumps({"kind": "Status", "reason": reason, "message": message}).encode()


def test_what_is_sent(fake: Fake, client: Api) -> None:
    fake.script = [(200, b'{"a": 1}')]
    assert client.patch("/apis/x", {"b": 2}, {"fieldManager": "m"}) == {"a": 1}
    method, path, headers, body = fake.seen[0]
    assert (method, path) == ("PATCH", "/prefix/apis/x?fieldManager=m")
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/merge-patch+json"
    assert headers["User-Agent"] == "test"
    assert json.loads(body) == {"b": 2}


@pytest.mark.parametrize(
    ("code", "body", "kind", "sentence"),
    [
        (404, status("NotFound", 'nodes "x" not found'), NotFound, 'nodes "x" not found'),
        (409, status("Conflict", "changed"), Conflict, "changed"),
        (410, status("Expired", "too old"), Expired, "too old"),
        (429, status("TooManyRequests", "budget"), TooManyRequests, "budget"),
        (403, status("Forbidden", "may not"), ApiRefused, "may not"),
        (403, b"<html>a proxy</html>", ApiRefused, "a proxy"),
        (403, b"", ApiRefused, "Forbidden"),
        (500, status("InternalError", "etcd"), ApiUnavailable, "answers 500: etcd"),
        (503, b"", ApiUnavailable, "answers 503"),
        (200, b"hello", ApiUnavailable, "is it an API server"),
    ],
)
def test_refusals(
    fake: Fake, client: Api, code: int, body: bytes, kind: type[Exception], sentence: str
) -> None:
    fake.script = [(code, body)]
    with pytest.raises(kind, match=sentence):
        client.get("/x")


def test_a_connection_is_used_again_and_replaced_when_the_server_has_closed_it(
    fake: Fake, client: Api
) -> None:
    fake.script = [(200, b"{}"), "close", (200, b'{"again": true}')]
    client.get("/x")
    assert client.get("/x") == {"again": True}, "nothing had been done on the closed one"
    assert len(fake.seen) == 3


def test_a_fresh_connection_that_breaks_is_an_error(fake: Fake, client: Api) -> None:
    fake.script = ["close"]
    with pytest.raises(ApiUnavailable, match="does not answer"):
        client.get("/x")


def test_a_silent_server_is_given_up(fake: Fake) -> None:
    fake.script = ["silent"]
    api = Api(Server(fake.url, None, lambda: None), timeout_s=0.2)
    with pytest.raises(ApiUnavailable, match="does not answer"):
        api.get("/x")


def test_a_silent_watch_is_given_up(fake: Fake, client: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "WATCH_SILENCE_S", 0.2)
    fake.script = ["silent"]
    with pytest.raises(ApiUnavailable):
        list(client.watch("/x", {}))


def item(version: str, name: str = "n1") -> dict[str, Any]:
    return {"metadata": {"name": name, "resourceVersion": version}}


def listing(version: str, *items: dict[str, Any]) -> tuple[int, bytes]:
    return 200, json.dumps({"metadata": {"resourceVersion": version}, "items": list(items)}).encode()


def follow(
    fake: Fake, client: Api, script: list[Answer], until: Callable[[list[Any]], bool]
) -> list[str | None]:
    """What a watch saw: the versions, None for an object that is gone."""
    fake.script = script
    seen: list[str | None] = []
    done = threading.Event()

    def note(found: dict[str, Any] | None) -> None:
        seen.append(found["metadata"]["resourceVersion"] if found else None)
        if until(seen):
            done.set()

    watch = ObjectWatch(client, "/nodes", "n1", note)
    watch.start()
    assert done.wait(30), seen
    watch.close()
    return seen


def test_a_watch_follows_changes_and_goes_on_where_it_was(fake: Fake, client: Api) -> None:
    first = [{"type": "MODIFIED", "object": item("6")}, {"type": "BOOKMARK", "object": item("9")}]
    second = [{"type": "DELETED", "object": item("10")}]
    seen = follow(
        fake, client, [listing("5", item("4")), first, second, "silent"], lambda seen: None in seen
    )  # fmt: skip
    assert seen == ["4", "6", None]
    paths = [path for _, path, _, _ in fake.seen]
    assert "fieldSelector=metadata.name%3Dn1" in paths[0]
    assert "resourceVersion=5" in paths[1]
    assert "resourceVersion=9" in paths[2], "a bookmark moves it on"


def test_an_expired_version_is_listed_again(fake: Fake, client: Api) -> None:
    gone = [{"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}]
    script: list[Answer] = [listing("5", item("4")), gone, listing("50", item("49")), "silent"]
    assert follow(fake, client, script, lambda seen: len(seen) == 2) == ["4", "49"]


def test_trouble_is_waited_out(fake: Fake, client: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "RETRY_S", (0.01, 0.02))
    script: list[Answer] = [
        (503, b""), "close", listing("5"), (500, b""), listing("6", item("6")), "silent",
    ]  # fmt: skip
    assert follow(fake, client, script, lambda seen: "6" in seen) == [None, "6"]


@pytest.mark.parametrize(
    ("description", "answer"),
    [
        ("nothing", b"{}"),
        ("null", b"null"),
        ("a list", b"[]"),
        ("a word", b'"ok"'),
        ("a Status", status("Maintenance", "back soon")),
        ("an object in place of a list", json.dumps(item("4")).encode()),
        ("no version", b'{"metadata": {}, "items": []}'),
        ("a version that is none", b'{"metadata": {"resourceVersion": null}, "items": []}'),
        ("no metadata", b'{"items": []}'),
        ("metadata that are none", b'{"metadata": "x", "items": []}'),
        ("items that are none", b'{"metadata": {"resourceVersion": "4"}, "items": "x"}'),
        ("an item that is none", b'{"metadata": {"resourceVersion": "4"}, "items": [null]}'),
        ("an item without metadata", b'{"metadata": {"resourceVersion": "4"}, "items": [{"spec": {}}]}'),
    ],
)
def test_a_list_that_makes_no_sense_is_waited_out(
    fake: Fake, client: Api, monkeypatch: pytest.MonkeyPatch, description: str, answer: bytes
) -> None:
    """And is not taken for "there is no such object"."""
    monkeypatch.setattr(watch_module, "RETRY_S", (0.01, 0.02))
    script: list[Answer] = [(200, answer), listing("6", item("6")), "silent"]
    assert follow(fake, client, script, bool) == ["6"]


@pytest.mark.parametrize(
    ("description", "event"),
    [
        ("nothing", {}),
        ("null", None),
        ("a list", []),
        ("a Status", {"kind": "Status", "message": "back soon"}),
        ("no object", {"type": "MODIFIED"}),
        ("no type", {"object": item("6")}),
        ("a type that is none", {"type": ["MODIFIED"], "object": item("6")}),
        ("an unknown type", {"type": "RESTORED", "object": item("6")}),
        ("an object that is none", {"type": "DELETED", "object": None}),
        ("no metadata", {"type": "DELETED", "object": {}}),
        ("no version", {"type": "DELETED", "object": {"metadata": {}}}),
        ("an error that is none", {"type": "ERROR", "object": "x"}),
        ("an error without an object", {"type": "ERROR"}),
    ],
)
def test_an_event_that_makes_no_sense_is_waited_out(
    fake: Fake, client: Api, monkeypatch: pytest.MonkeyPatch, description: str, event: object
) -> None:
    monkeypatch.setattr(watch_module, "RETRY_S", (0.01, 0.02))
    script: list[Answer] = [listing("5", item("4")), [event], listing("7", item("7")), "silent"]
    assert follow(fake, client, script, lambda seen: len(seen) == 2) == ["4", "7"]


@pytest.mark.parametrize("mistake", [RuntimeError, KeyError, TypeError, AttributeError])
@pytest.mark.parametrize("at", ["list", "watch"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watch_that_ends_by_an_error_of_ours_says_so(
    fake: Fake, client: Api, at: str, mistake: type[Exception]
) -> None:
    """It is not taken for an answer that makes no sense."""
    fake.script = [listing("5", item("4")), [{"type": "MODIFIED", "object": item("6")}]]

    def broken(found: dict[str, Any] | None) -> None:
        if found == item("4" if at == "list" else "6"):
            raise mistake("a mistake")

    watch = ObjectWatch(client, "/nodes", "n1", broken)
    watch.start()
    watch._thread.join(30)  # with its traceback, which would else fall into the next test
    assert "has ended" in watch.error


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((403, status("Forbidden", "may not list")), "may not list"),
        ((200, b"{}"), "makes no sense.*check what stands in front of it"),
    ],
)
def test_the_error_is_told_while_nothing_can_be_heard(
    fake: Fake, client: Api, monkeypatch: pytest.MonkeyPatch, answer: Answer, sentence: str
) -> None:
    monkeypatch.setattr(watch_module, "RETRY_S", (0.01, 0.02))
    fake.script = [answer]
    watch = ObjectWatch(client, "/nodes", "n1", lambda found: None)
    watch.start()
    deadline = time.monotonic() + 30
    while not watch.error:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert watch._thread.is_alive()
    watch.close()
    assert re.search(sentence, watch.error)
