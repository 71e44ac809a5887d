# SPDX-License-Identifier: Apache-2.0
"""Prompts of real text with an exact number of tokens.

A prompt is the model's chat header, passages of our own text from a starting point that
depends on the prompt's number, cut to length, and the chat footer.  The ids come from the
offline driver's `ready` report (the engine's tokenizer runs in the engine's Python); from
there on everything is pure and deterministic.  Called by the demo's app.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from valve_cli.demo.errors import MeasurementError


@dataclass(frozen=True)
class Prompts:
    """Token ids of the chat format and of each passage of text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    passages: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not any(self.passages):
            raise MeasurementError("the tokenizer gave no tokens for any passage of the demo's text")

    @classmethod
    def of(cls, prefix: Sequence[int], suffix: Sequence[int], passages: Sequence[Sequence[int]]) -> Prompts:
        return cls(tuple(prefix), tuple(suffix), tuple(tuple(p) for p in passages))

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt that can be made: the chat format and one token of text."""
        return len(self.prefix) + len(self.suffix) + 1

    def make(self, number: int, tokens: int) -> list[int]:
        """Prompt `number`, exactly `tokens` long (at least `shortest`).

        The starting passage and the stride between passages both depend on `number`, so that
        neighbouring prompts differ from their first word on."""
        if tokens < self.shortest:
            raise MeasurementError(
                f"a prompt of {tokens} tokens was asked for, this model's chat format alone takes"
                f" {self.shortest - 1}: raise the lower bound of the context scaling"
            )
        room = tokens - len(self.prefix) - len(self.suffix)
        count = len(self.passages)
        stride = 1 + 2 * (number // count % max(count // 2, 1))
        body: list[int] = []
        at = number
        while len(body) < room:
            body.extend(self.passages[at % count])
            at += stride
        return [*self.prefix, *body[:room], *self.suffix]
