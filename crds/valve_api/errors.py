# SPDX-License-Identifier: Apache-2.0
"""Everything valve_api can refuse, as one tree.

    ApiError
    ├── UnitError      a quantity, duration or share that cannot be read (also a ValueError)
    └── PolicyError    a policy file, a policy object or a device that does not fit it

Imported by every module here; imports nothing but the standard library, so that
`settings` stays free of pydantic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class ApiError(Exception):
    """Root of the tree."""


class UnitError(ApiError, ValueError):
    """A quantity, duration or share that cannot be read; the message says what to write instead."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a policy.

    path: the field as the operator writes it, `spec.memory.reservation.min`; "" for the whole file.
    given: what stands there, as YAML would show it; "" where nothing does.
    allowed: a sentence that says what may stand there.
    """

    path: str
    given: str
    allowed: str

    def __str__(self) -> str:
        if not self.path:
            return self.allowed
        return f"{self.path}: {f'{self.given}: ' if self.given else ''}{self.allowed}"


class PolicyError(ApiError):
    """A refused policy; `problems` lists everything that is wrong, not only the first."""

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(source, self.problems)

    def __str__(self) -> str:
        head = f"{self.source} is refused"
        if len(self.problems) == 1:
            return f"{head}: {self.problems[0]}"
        lines = [f"{head}, {len(self.problems)} problems:", *(f"  {problem}" for problem in self.problems)]
        return "\n".join(lines)
