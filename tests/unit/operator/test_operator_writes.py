# SPDX-License-Identifier: Apache-2.0
"""Actions as requests: what each sends, what it tells the cache, and events that are told once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from valve_operator.actions import (
    Action,
    DeleteDaemonSet,
    DeleteNode,
    EventNote,
    Evict,
    LabelNode,
    WriteDaemonSet,
    WriteNode,
    WriteStatus,
)
from valve_operator.api import Api, Kind
from valve_operator.errors import ApiError, BusyError, ConflictError, GoneError
from valve_operator.writes import Writes

Json = dict[str, Any]
DAEMONSETS = Kind("DaemonSet", "apps/v1", "daemonsets", "ns")
NOTE = EventNote("Warning", "NotReady", "because")


class Recorder(Api):
    """Notes requests, answers with what it was given."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, Json]] = []
        self.fail: dict[str, Exception] = {}

    def _note(self, verb: str, where: str, body: Json) -> Json:
        self.sent.append((verb, where, body))
        for part, error in self.fail.items():
            if part in where:
                raise error
        return body

    async def apply(self, kind: Kind, manifest: Json, subresource: str = "") -> Json:
        name = manifest["metadata"]["name"]
        return self._note("apply", f"{kind.name}/{name}/{subresource}".rstrip("/"), manifest)

    async def create(self, path: str, body: Json) -> Json:
        return self._note("create", path, body)

    async def delete(self, kind: Kind, name: str, uid: str, namespace: str = "") -> None:
        self._note("delete", f"{kind.name}/{name}", {"uid": uid})


class Rig:
    def __init__(self) -> None:
        self.api = Recorder()
        self.seen: list[str] = []
        self.gone: list[str] = []
        self.writes = Writes(
            self.api,
            DAEMONSETS,
            "me",
            lambda kind, raw: self.seen.append(f"{kind}/{raw['metadata']['name']}"),
            lambda kind, name: self.gone.append(f"{kind}/{name}"),
        )

    def do(self, action: Action) -> None:
        asyncio.run(self.writes.do(action))


MANIFEST = {"metadata": {"name": "d"}}
REQUESTS: list[tuple[Action, str, str, Json]] = [
    (WriteNode("n", {"a": 1}, "u"), "apply", "ColocationNode/n", {"spec": {"a": 1}}),
    # with the uid, or an apply would create a Node that is gone
    (
        LabelNode("n", "u", {"l": "v"}),
        "apply",
        "Node/n",
        {"metadata": {"name": "n", "uid": "u", "labels": {"l": "v"}}},
    ),
    (WriteDaemonSet("d", MANIFEST), "apply", "DaemonSet/d", MANIFEST),
    (DeleteNode("n", "u"), "delete", "ColocationNode/n", {"uid": "u"}),
    (DeleteDaemonSet("d", "u"), "delete", "DaemonSet/d", {"uid": "u"}),
    (
        WriteStatus("p", "u", {"nodes": 1}, True),
        "apply",
        "ColocationPolicy/p/status",
        {"status": {"nodes": 1}, "metadata": {"name": "p", "uid": "u"}},
    ),
    (
        Evict("ns", "pod", "u", NOTE),
        "create",
        "/api/v1/namespaces/ns/pods/pod/eviction",
        {"kind": "Eviction", "deleteOptions": {"preconditions": {"uid": "u"}}},
    ),
]


@pytest.mark.parametrize(
    ("action", "verb", "where", "holds"), REQUESTS, ids=[type(case[0]).__name__ for case in REQUESTS]
)
def test_an_action_is_one_request(action: Action, verb: str, where: str, holds: Json) -> None:
    rig = Rig()
    rig.do(action)
    sent_verb, sent_where, body = rig.api.sent[0]
    assert (sent_verb, sent_where) == (verb, where)
    assert {key: body[key] for key in holds} == holds
    told = rig.gone if verb == "delete" else rig.seen
    assert told == ([] if isinstance(action, Evict) else [where.removesuffix("/status")])


@pytest.mark.parametrize(
    "error", [GoneError("r", 404, ""), ConflictError("r", 409, "")], ids=["gone", "another"]
)
def test_deleting_what_is_not_there_is_done(error: ApiError) -> None:
    rig = Rig()
    rig.api.fail["ColocationNode"] = error
    rig.do(DeleteNode("n", "u"))
    assert rig.gone == ["ColocationNode/n"]


def events(rig: Rig) -> list[Json]:
    return [body for _, where, body in rig.api.sent if where.endswith("/events")]


def test_an_event_has_a_name_made_of_what_it_says() -> None:
    rig = Rig()
    for uid, note in (("u", NOTE), ("u", NOTE), ("u", EventNote("Normal", "Ready", "now")), ("other", NOTE)):
        rig.do(WriteStatus("p", uid, {}, True, (note,)))
    first, again, else_said, else_whom = events(rig)
    assert first["metadata"]["name"] == again["metadata"]["name"]
    assert len({e["metadata"]["name"] for e in (first, else_said, else_whom)}) == 3
    assert first["metadata"]["namespace"] == "default", "the API server wants it so for what has no namespace"
    assert first["involvedObject"]["uid"] == "u"


def test_an_event_of_a_pod_lies_beside_it() -> None:
    rig = Rig()
    rig.do(Evict("ns", "pod", "u", NOTE))
    assert events(rig)[0]["metadata"]["namespace"] == "ns"


@pytest.mark.parametrize(
    "error", [ConflictError("r", 409, "told"), ApiError("r", 403, "no")], ids=["told", "refused"]
)
def test_an_event_that_fails_does_not_fail_its_action(error: ApiError) -> None:
    rig = Rig()
    rig.api.fail["/events"] = error
    rig.do(WriteStatus("p", "u", {}, True, (NOTE,)))
    assert rig.seen == ["ColocationPolicy/p"]


def test_an_eviction_that_is_refused_tells_no_event() -> None:
    rig = Rig()
    rig.api.fail["/eviction"] = BusyError("r", 429, "budget")
    with pytest.raises(BusyError):
        rig.do(Evict("ns", "pod", "u", NOTE))
    assert not events(rig)
