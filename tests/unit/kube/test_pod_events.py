# SPDX-License-Identifier: Apache-2.0
"""What a pod's owner is told of, and how seldom."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from valve_agent.events import EventLog, Labelled
from valve_agent.kube.api import ApiUnavailable
from valve_agent.kube.pod_events import PER_MINUTE, Pod, PodEvents

BATCH = Pod("uid-1", "jobs", "batch-0", "main")


class Server:
    """Takes posts, or refuses them."""

    def __init__(self) -> None:
        self.posts: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.away = False

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.posts.put((path, body))
        if self.away:
            raise ApiUnavailable("no route to host")
        return body

    def next(self) -> tuple[str, dict[str, Any]]:
        return self.posts.get(timeout=20)


class Node:
    def __init__(self) -> None:
        self.server, self.pods, self.now = Server(), {7: BATCH}, 0.0
        self.events = PodEvents(
            self.server,
            "node-1",
            lambda pid: self.pods.get(pid),
            clock=lambda: int(self.now * 1e9),  # type: ignore[arg-type]
        )
        self.events.start()


@pytest.fixture
def node() -> Any:
    made = Node()
    yield made
    made.events.close()


def told(node: Node) -> list[str]:
    """Reasons of all that was posted, in order."""
    node.events.close()
    found = []
    while not node.server.posts.empty():
        found.append(node.server.posts.get()[1]["reason"])
    return found


def test_the_event_is_what_kubectl_describe_looks_for(node: Node) -> None:
    node.events.hear("kill", {"pid": 7, "why": "could not be paused for 1000 ms"})
    path, body = node.server.next()
    assert path == "/api/v1/namespaces/jobs/events"
    assert body["involvedObject"] == {
        "apiVersion": "v1", "kind": "Pod", "namespace": "jobs", "name": "batch-0", "uid": "uid-1",
        "fieldPath": "spec.containers{main}",
    }  # fmt: skip
    assert (body["type"], body["reason"]) == ("Warning", "ValveKilled")
    assert body["message"] == "could not be paused for 1000 ms"
    assert (body["reportingComponent"], body["reportingInstance"]) == ("valve-agent", "node-1")


@pytest.mark.parametrize(
    ("description", "heard", "reasons"),
    [
        ("of no interest", [("grant", 7), ("pause", 7), ("attach", 7)], []),
        ("of no pod", [("kill", 8)], []),
        ("without a process", [("kill", None)], []),
        ("twice the same", [("kill", 7), ("kill", 7)], ["ValveKilled"]),
        ("the same by another name", [("kill", 7), ("uncontrolled", 7)], ["ValveKilled"]),
        ("two things", [("denied", 7), ("kill", 7)], ["ValveMemoryDenied", "ValveKilled"]),
    ],
)
def test_what_is_told(
    description: str, heard: list[tuple[str, int | None]], reasons: list[str], node: Node
) -> None:
    for event, pid in heard:
        node.events.hear(event, {"pid": pid, "why": "because"})
    assert told(node) == reasons, description


def test_a_process_that_is_gone_is_known_from_its_attach(node: Node) -> None:
    node.events.hear("attach", {"pid": 7})
    node.pods.clear()
    node.events.hear("kill", {"pid": 7, "why": ""})
    assert told(node) == ["ValveKilled"]


def test_after_a_minute_it_is_told_again(node: Node) -> None:
    for now in (0.0, 59.0, 60.0):
        node.now = now
        node.events.hear("kill", {"pid": 7, "why": ""})
    assert told(node) == ["ValveKilled"] * 2


def test_a_node_posts_so_many_in_a_minute(node: Node) -> None:
    for number in range(2 * PER_MINUTE):
        node.pods[number] = Pod(f"uid-{number}", "jobs", f"batch-{number}", "main")
        node.events.hear("kill", {"pid": number, "why": ""})
    assert PER_MINUTE <= len(told(node)) <= PER_MINUTE + 2


def test_a_server_that_is_away_is_no_trouble(node: Node) -> None:
    node.server.away = True
    node.events.hear("kill", {"pid": 7, "why": ""})
    node.server.next()
    node.server.away = False
    node.events.hear("denied", {"pid": 7, "why": ""})
    assert node.server.next()[1]["reason"] == "ValveMemoryDenied"


def test_the_log_lets_it_hear_everything_but_debug() -> None:
    log, heard = EventLog(), []
    labelled = Labelled(log, gpu="GPU-1")
    labelled.listen(lambda event, fields: heard.append((event, dict(fields))))
    labelled.emit("kill", level="error", pid=7)
    labelled.emit("grant", level="debug", pid=7)
    log.emit("stop")
    log.close()
    assert heard == [("kill", {"gpu": "GPU-1", "pid": 7}), ("stop", {})]
