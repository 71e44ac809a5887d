# SPDX-License-Identifier: Apache-2.0
"""Writes docs/annotations.md from the cases.

    python -m valve_operator.reference            write it
    python -m valve_operator.reference --check    exit 1 where it is out of date

Run by developers after a change of admission; a test runs the check. Needs a checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from valve_operator.cases import CASES, Case

PATH = "docs/annotations.md"
HEAD = """\
<!-- Generated from operator/valve_operator/cases.py by `python -m valve_operator.reference`; do not edit. -->
# Annotations of a pod

Write them on the pod: in a Deployment or a Job that is `spec.template.metadata.annotations`.

| annotation | on | value |
|---|---|---|
| `valve.io/workload` | every pod of Valve | `online` (latency-critical) or `offline` (paused for it) |
| `valve.io/gpu-memory` | offline pods | most device memory it may hold, `24Gi` for example, in whole GiB |
| `valve.io/container` | pods of several containers | name of the one that holds the engine |

At admission Valve turns them into resources (`valve.io/online-gpu`, `valve.io/offline-memory-gib`), the label
`valve.io/workload`, a priority class where the pod names none, a toleration of the GPU nodes' taint, and for
offline pods a preference for nodes whose offline work is not starved.

* A pod that contradicts itself is refused with a sentence for everything that is wrong.
* An annotated pod is refused while Valve's webhook does not answer: it never runs unprotected.
* Pods without annotations never meet Valve.
* The annotations of a pod cannot be changed once it exists: delete it and make a new one.

"""


def document() -> str:
    """The text of docs/annotations.md."""
    good = [case for case in CASES if isinstance(case.outcome, dict)]
    bad = [case for case in CASES if not isinstance(case.outcome, dict)]
    lines = [
        HEAD + "## What they become",
        "",
        "| | annotations | the engine's container asks for |",
        "|---|---|---|",
    ]
    lines += [f"| {case.what} | {_annotations(case)} | {_resources(case)} |" for case in good]
    lines += ["", "## What is refused", "", "| | annotations | the sentence |", "|---|---|---|"]
    lines += [f"| {case.what} | {_annotations(case)} | {_sentences(case)} |" for case in bad]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m valve_operator.reference", description="Writes " + PATH)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where it is out of date")
    options = parser.parse_args(arguments)
    path = Path(__file__).parents[2] / PATH
    if options.check:
        if path.exists() and path.read_text("utf-8") == document():
            return 0
        print(f"{PATH} is out of date; run python -m valve_operator.reference", file=sys.stderr)
        return 1
    path.write_text(document(), "utf-8")
    return 0


def _annotations(case: Case) -> str:
    return "<br>".join(f"`valve.io/{key}: {value}`" for key, value in case.annotations.items()) or "none"


def _resources(case: Case) -> str:
    assert isinstance(case.outcome, dict)
    where = "" if list(case.containers) == ["engine"] else f" ({case.engine})"
    return "<br>".join(f"`{name}: {amount}`{where}" for name, amount in case.outcome.items())


def _sentences(case: Case) -> str:
    return "<br>".join(text.replace("|", "\\|") for text in case.outcome)


if __name__ == "__main__":
    sys.exit(main())
