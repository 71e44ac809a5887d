# SPDX-License-Identifier: Apache-2.0
"""The device plugin's ledger as the agent reads it: the same document, over its real socket."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from valve_agent.kube.ledger import SOCKET, Ledger, LedgerError, gpus_of
from valve_api.container import ContainerName
from valve_api.names import RESOURCE_ONLINE_GPU
from valve_deviceplugin.allocator import document
from valve_deviceplugin.allocator.ledger import Entry
from valve_deviceplugin.allocator.ledger import Ledger as Book

CHAT = ContainerName("serve", "chat-0", "vllm")


def entry(number: int, *gpus: str, owner: ContainerName | None = CHAT) -> Entry:
    return Entry(
        id=number, resource=RESOURCE_ONLINE_GPU, gpus=gpus, units=0, tokens=frozenset({f"t{number}"}),
        owner=owner, shortage=0, library="/opt/valve/1", at_s=0.0,
    )  # fmt: skip


def test_what_the_plugin_writes_is_what_the_agent_reads() -> None:
    book = Book([entry(1, "GPU-b", "GPU-a"), entry(2, "GPU-b"), entry(3, "GPU-c", owner=None)], 7)
    assert gpus_of(document.write(book, [])) == {CHAT: ("GPU-b", "GPU-a")}


@pytest.mark.parametrize(
    ("description", "made", "words"),
    [
        ("another schema", {"schema": "valve.io/allocations/v9"}, "does not speak valve.io/allocations/v1"),
        ("no object", [], "does not speak"),
        ("not whole", {"schema": document.SCHEMA, "allocations": [{"owner": {}}]}, "is not whole"),
    ],
)
def test_what_is_refused(description: str, made: Any, words: str) -> None:
    with pytest.raises(LedgerError, match=words):
        gpus_of(made)


def test_over_a_socket(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="is it running"):
        Ledger(tmp_path).read()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / SOCKET))
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(json.dumps(document.write(Book([entry(1, "GPU-a")], 1), [])).encode())

        thread = threading.Thread(target=answer)
        thread.start()
        assert Ledger(tmp_path).read() == {CHAT: ("GPU-a",)}
        thread.join()
