# SPDX-License-Identifier: Apache-2.0
"""Just enough C to find a statement by its structure: tokens with their place, and matching brackets.

Why it exists: a patch found by line number or by its surrounding text breaks with every release, or worse,
lands elsewhere. Tokens do not see white space and comments, and nothing else may differ.

Not a parser: macros are not expanded. A preprocessor line is one token of kind "#", so that a caller can
refuse code that is conditional. Threading model: pure functions. Caller: patch_driver.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_OPEN = {"(": ")", "{": "}", "[": "]"}
_TOKEN = re.compile(
    r"""
      (?P<space>\s+|//[^\n]*|/\*.*?\*/)
    | (?P<hash>^[ \t]*\#(?:[^\n\\]|\\.)*)
    | (?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    | (?P<word>[A-Za-z_]\w*)
    | (?P<number>\.?\d[\w.]*)
    | (?P<sign>->|\+\+|--|<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\.\.\.|[^\w\s"'])
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


class SourceError(Exception):
    """The text is not C that this module understands; the message says where."""


class Token(NamedTuple):
    text: str
    at: int
    """Offset of its first character in the source."""


def tokens(source: str) -> list[Token]:
    """All tokens but white space and comments. Raises SourceError."""
    found = []
    at = 0
    while at < len(source):
        match = _TOKEN.match(source, at)
        if match is None or match.end() == at:
            raise SourceError(f"line {line_of(source, at)}: not understood as C")
        if match.lastgroup == "hash":
            found.append(Token("#", at))
        elif match.lastgroup != "space":
            found.append(Token(match.group(), at))
        at = match.end()
    return found


def line_of(source: str, at: int) -> int:
    """The number of the line, from 1, that the offset lies in."""
    return source.count("\n", 0, at) + 1


def texts(some: Sequence[Token]) -> list[str]:
    return [token.text for token in some]


def closing(some: Sequence[Token], start: int) -> int:
    """The index of the bracket that closes the one at index `start`. Raises SourceError."""
    expected: list[str] = []
    for index in range(start, len(some)):
        text = some[index].text
        if text in _OPEN:
            expected.append(_OPEN[text])
        elif text in _OPEN.values():
            if expected.pop() != text:
                break
            if not expected:
                return index
    raise SourceError(f"the bracket {some[start].text!r} at offset {some[start].at} is not closed")


def find(some: Sequence[Token], words: Sequence[str], start: int = 0, end: int | None = None) -> list[int]:
    """Every index in [start, end) at which this sequence of tokens begins."""
    stop = len(some) if end is None else end
    wanted = list(words)
    return [i for i in range(start, stop - len(wanted) + 1) if texts(some[i : i + len(wanted)]) == wanted]


def function(some: Sequence[Token], name: str) -> tuple[Sequence[Token], Sequence[Token]]:
    """Parameters and body (with its braces) of the one definition of `name`. Raises SourceError."""
    definitions = []
    for at in find(some, [name, "("]):
        end = closing(some, at + 1)
        if end + 1 < len(some) and some[end + 1].text == "{":
            body = some[end + 1 : closing(some, end + 1) + 1]
            definitions.append((some[at + 2 : end], body))
    if len(definitions) != 1:
        raise SourceError(f"{len(definitions)} definitions of {name} where one was expected")
    return definitions[0]
