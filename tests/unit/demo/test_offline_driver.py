# SPDX-License-Identifier: Apache-2.0
"""The offline driver's bookkeeping, with an engine that is made up: it counts one token per step."""

from __future__ import annotations

import io
import json
import queue
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from valve_cli.demo.offline_driver import Batch, Reporter, chat_parts, serve


@dataclass
class MadeUpEngine:
    """Gives every live request one token per step, at most `room` requests at a time."""

    room: int = 3
    live: dict[str, list[int]] = field(default_factory=dict)

    def add_request(self, rid: str, prompt: dict[str, Any], max_tokens: int) -> None:
        assert rid not in self.live
        self.live[rid] = [prompt["prompt_token_ids"][0], max_tokens]

    def abort_request(self, ids: list[str]) -> None:
        for rid in ids:
            del self.live[rid]

    def has_unfinished_requests(self) -> bool:
        return bool(self.live)

    def step(self) -> list[Any]:
        outputs = []
        for rid, state in list(self.live.items())[: self.room]:
            state[1] -= 1
            finished = state[1] == 0
            if finished:
                del self.live[rid]
            token = SimpleNamespace(token_ids=[state[0] * 100 + state[1]])
            outputs.append(SimpleNamespace(request_id=rid, outputs=[token], finished=finished))
        return outputs


def make() -> tuple[Batch, io.StringIO]:
    stream = io.StringIO()
    batch = Batch(MadeUpEngine(), lambda n: n, Reporter(stream))
    batch.load([{"ids": [n], "max_tokens": n + 1} for n in range(4)])
    return batch, stream


def events(stream: io.StringIO, name: str) -> list[dict[str, Any]]:
    return [e for line in stream.getvalue().splitlines() if (e := json.loads(line))["event"] == name]


def test_the_batch_stays_full_and_prompts_come_in_order_again_and_again() -> None:
    batch, stream = make()
    batch.feed(5, "p")
    for _ in range(40):
        batch.step()
        assert len(batch.engine.live) == 5
    issued = events(stream, "issued")
    assert [e["prompt"] for e in issued] == [n % 4 for n in range(len(issued))]
    assert [e["id"] for e in issued] == [f"p-{n:05d}" for n in range(len(issued))]


def test_a_finished_request_reports_all_its_tokens_once() -> None:
    batch, stream = make()
    batch.feed(4, "p")
    batch.stop()
    while batch.busy:
        batch.step()
    done = events(stream, "done")
    assert sorted(e["id"] for e in done) == sorted(e["id"] for e in events(stream, "issued"))
    for event in done:
        n = event["prompt"]
        assert event["tokens"] == [n * 100 + k for k in range(n, -1, -1)]
        assert 0 < event["t_first_ns"] <= event["t_ns"]
    assert events(stream, "step")[-1]["tokens"] == sum(len(e["tokens"]) for e in done)
    assert len(events(stream, "drained")) == 1


def test_stop_with_nothing_in_flight_is_drained_at_once() -> None:
    batch, stream = make()
    batch.stop()
    assert len(events(stream, "drained")) == 1


def test_abort_names_what_it_dropped_and_a_new_phase_begins_at_the_first_prompt() -> None:
    batch, stream = make()
    batch.feed(3, "one")
    batch.step()
    dropped = list(batch.engine.live)
    batch.abort()
    assert events(stream, "aborted")[0]["ids"] == dropped
    assert not batch.busy
    batch.feed(1, "two")
    assert events(stream, "issued")[-1]["prompt"] == 0
    assert events(stream, "issued")[-1]["id"].startswith("two-")


def test_commands_are_obeyed_between_steps_until_exit() -> None:
    batch, stream = make()
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for command in (
        {"cmd": "load", "prompts": [{"ids": [7], "max_tokens": 2}]},
        {"cmd": "feed", "sequences": 2, "phase": "p"},
        {"cmd": "stop"},
        {"cmd": "exit"},
    ):
        commands.put(command)
    serve(batch, commands)
    assert [e["prompts"] for e in events(stream, "loaded")] == [4, 1]
    assert len(events(stream, "issued")) == 2


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ({"cmd": "dance"}, "unknown command 'dance'"),
        ({"cmd": "feed", "sequences": 1, "phase": "p"}, "no prompts"),
    ],
    ids=["unknown", "feed before load"],
)
def test_a_wrong_command_is_an_error(command: dict[str, Any], says: str) -> None:
    batch = Batch(MadeUpEngine(), lambda n: n, Reporter(io.StringIO()))
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    commands.put(command)
    with pytest.raises(ValueError, match=says):
        serve(batch, commands)


class Letters:
    """A tokenizer of single characters with a chat format."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<u>{messages[0]['content']}</u>"


def test_chat_parts_are_what_stands_around_the_users_text() -> None:
    parts = chat_parts(Letters(), ["ab"])
    assert bytes(parts["prefix_ids"]) == b"<u>"
    assert bytes(parts["suffix_ids"]) == b"</u>"
    assert parts["passages"] == [[ord(c) for c in " ab"]]


def test_a_model_without_a_chat_format_gets_plain_text() -> None:
    tokenizer = Letters()
    tokenizer.chat_template = ""
    assert chat_parts(tokenizer, ["x"])["prefix_ids"] == []
