# SPDX-License-Identifier: Apache-2.0
"""Exception tree of `valve demo`.

    DemoError                  anything the user is told about in one sentence; exit status 1
      TraceError               a trace file that cannot be read, or holds too little
      ProcessError             a process that did not start, died, or reported a failure
      MeasurementError         a phase that ran but did not give what the report needs

Raised everywhere in the package, caught only in `valve_cli.demo.main.main`.
"""

from __future__ import annotations

from pathlib import Path


class DemoError(Exception):
    """A failure of the demo; the message says what happened and what to do."""


class TraceError(DemoError):
    """The trace file is not what its format says, or is too short."""


class MeasurementError(DemoError):
    """A phase ended without the figures the report is made of."""


class ProcessError(DemoError):
    """A process of the demo failed; `log` is where its own words are."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        self.log = log
        super().__init__(f"{message}; its log is {log}" if log else message)
