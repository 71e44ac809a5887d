# SPDX-License-Identifier: Apache-2.0
"""Everything the operator can fail with, as one tree.

OperatorError
├── ConfigError       flags or mounted files that cannot be used: main ends with the sentence
├── TemplateError     a DaemonSet template that is none
├── NotLeaderError    this replica may not write (any more)
└── ApiError          the API server refused or did not answer
    ├── GoneError         404: the object is not there
    ├── ConflictError     409: somebody else wrote first, or it exists
    └── BusyError         429 or 503: later; `retry_after_s` says when, if the server did
"""

from __future__ import annotations


class OperatorError(Exception):
    """Root of the tree."""


class ConfigError(OperatorError):
    """Flags or mounted files that cannot be used; the message says what to give instead."""


class TemplateError(ConfigError):
    """A DaemonSet template that is none; the message names file and field."""


class NotLeaderError(OperatorError):
    """A write was tried without the Lease, or too late for it."""


class ApiError(OperatorError):
    """The API server refused or did not answer. status: the HTTP status, 0 without an answer."""

    def __init__(self, request: str, status: int, text: str) -> None:
        self.request = request
        self.status = status
        self.text = text
        answer = f"answered {status}" if status else "got no answer"
        super().__init__(f"{request} {answer}: {text}")


class GoneError(ApiError):
    """404."""


class ConflictError(ApiError):
    """409."""


class BusyError(ApiError):
    """429 or 503. retry_after_s: what the server asks for; None where it does not say."""

    def __init__(self, request: str, status: int, text: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(request, status, text)


def error_of(request: str, status: int, text: str, retry_after_s: float | None = None) -> ApiError:
    """The error of an HTTP status."""
    if status == 404:
        return GoneError(request, status, text)
    if status == 409:
        return ConflictError(request, status, text)
    if status in (429, 503):
        return BusyError(request, status, text, retry_after_s)
    return ApiError(request, status, text)
