#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Qualifies a GPU machine for Valve: asks it E1 to E16 and measures, one JSON file per part.

    make gpu                        every part
    make gpu PARTS=e1,e4            some
    make gpu WITHIN=570             as many as fit; it says which are left
    python3 e2e/gpu/qualify.py --list

Why it exists: what nobody has run on hardware is only believed (docs/gpu.md). Each part runs in a process of
its own with a deadline, because a driver may hang; whatever happens, a part leaves a file that says so. It
changes no setting of the GPU, loads nothing and resets nothing.

Needs Python 3.11 or later, nvcc with its host compiler, and nothing else (`serving`: torch and transformers).
Threading model: none. Called by `make gpu`, and on the fake driver by tests/native/fakenv.

Exit status: 0 no part failed or broke; 1 some did, or were not run in the time; 2 nothing can be run here, or
wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "node_agent")]

from qualification import machine, parts  # noqa: E402
from qualification.record import SCHEMA, Clock, Found, Skip  # noqa: E402

RESULTS = ROOT / "docs" / "results"
LEAST_S = 20.0
"""No part is begun with less time left."""
END_S = 8.0
"""For what follows a part that does not end."""
CLOCK_SHARE = 0.85
"""Of a part's limit is for its cycles; the rest is for its processes' coming and going."""
KILL_S = 30.0
DRAFT = "draft"
STARTED = time.monotonic()
STUCK = "did not end, and cannot be killed: it hangs in the driver. Nothing more can be asked of this machine"


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.list:
        for part in parts.PARTS.values():
            print(f"{part.name:10} {part.question}")
        return 0
    if arguments.split:
        for document in json.loads(arguments.split.read_text()):
            _write_part(arguments.out, document)
        return 0
    names = list(parts.ORDER) if arguments.parts == "all" else arguments.parts.split(",")
    unknown = [name for name in names if name not in parts.PARTS]
    if unknown:
        print(f"qualify: no part {', '.join(unknown)}; there are: {', '.join(parts.PARTS)}", file=sys.stderr)
        return 2
    if arguments.child:
        return _child(names[0], arguments)
    try:
        here = machine.this()
        machine.build(here, arguments.build)
    except Skip as problem:
        print(f"qualify: {problem}", file=sys.stderr)
        return 2
    print(f"{here.device}, driver {here.driver}, Linux {here.kernel}", flush=True)
    if here.assumed:
        print(f"qualify: {here.assumed}", file=sys.stderr)
    return _run_all(names, here, arguments)


def _run_all(names: list[str], here: machine.Machine, arguments: argparse.Namespace) -> int:
    """One part after the other, each written as it ends."""
    documents: list[dict[str, object]] = []
    until = time.monotonic() + arguments.within if arguments.within else float("inf")
    left = list(names)
    while left and until - time.monotonic() > LEAST_S:
        part = parts.PARTS[left.pop(0)]
        limit_s = min(arguments.limit or part.limit_s, until - time.monotonic() - END_S)
        document = _run(part, here, arguments, limit_s)
        documents.append(document)
        if arguments.bundle:
            _write(arguments.out / f"gpu-{machine.slug(here.device)}-parts.json", documents)
        else:
            _write_part(arguments.out, document)
        if document["answer"] == STUCK:
            break
    if left:
        print(f"not run, for time was up or the driver hangs: PARTS={','.join(left)}", flush=True)
    return int(bool(left) or any(document["verdict"] in ("fail", "error") for document in documents))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qualify.py", description="Qualify a GPU machine for Valve.")
    parser.add_argument("--parts", default="all", metavar="E1,E2,...", type=str.lower)
    parser.add_argument("--list", action="store_true", help="the parts and what each asks")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or RESULTS),
        help="where the JSON files go (default: $OUT, else docs/results)",
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="what is built goes there")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the number of cycles; 0.01 for a first look"
    )
    parser.add_argument("--limit", type=float, metavar="S", help="end each part after so many seconds")
    parser.add_argument(
        "--within", type=float, metavar="S", help="begin nothing that would not end within so many seconds"
    )
    parser.add_argument("--bundle", action="store_true", help="one file with all parts instead of one each")
    parser.add_argument("--split", type=Path, metavar="FILE", help="make one file each of such a bundle")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _run(
    part: parts.Part, here: machine.Machine, arguments: argparse.Namespace, limit_s: float
) -> dict[str, object]:
    """One part in a process of its own; its document."""
    began, utc = time.monotonic(), datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="valve-part-", dir=_memory_folder()) as folder:
        answer = Path(folder) / "found.json"
        command = [
            sys.executable, str(Path(__file__).resolve()), "--parts", part.name,
            "--scale", str(arguments.scale), "--build", str(arguments.build),
            "--limit", str(limit_s), "--child", str(answer),
        ]  # fmt: skip
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(limit_s)
            found = _read(answer, f"ended with {process.returncode}")
        except subprocess.TimeoutExpired:
            found = _read(
                answer, f"did not end within {limit_s:.3g} s; its processes were killed", draft=True
            )
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(KILL_S)
        except subprocess.TimeoutExpired:
            found = {**found, "verdict": "error", "answer": STUCK}
    document: dict[str, object] = {
        "schema": SCHEMA,
        "part": part.name,
        "question": part.question,
        **found,
        "device": here.device,
        "driver": here.driver,
        "kernel": here.kernel,
        "commit": machine.commit(os.environ),
        "command": f"make gpu PARTS={part.name}"
        + (f" SCALE={arguments.scale}" if arguments.scale != 1 else ""),
        "invocation": shlex.join(sys.argv),
        "utc": utc.isoformat(timespec="seconds"),
        "took_s": round(time.monotonic() - began, 1),
    }
    print(f"  {found['verdict']:8} {part.name:10} {document['took_s']:6} s  {found['answer']}", flush=True)
    return document


def _memory_folder() -> str | None:
    """For pages that kernels write: memory of a file on a disk cannot be given to a GPU everywhere."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _read(answer: Path, problem: str, draft: bool = False) -> dict[str, object]:
    """What the part has written; where that is a draft only, an error with the draft's figures."""
    found = json.loads(answer.read_text()) if answer.exists() else asdict(Found(DRAFT, ""))
    if draft or found["verdict"] == DRAFT:
        kept = "; the figures are what it had by then" if found["figures"] else ""
        found |= {"verdict": "error", "answer": problem + kept}
    return dict(found)


def _child(name: str, arguments: argparse.Namespace) -> int:
    """Run the part here and write what it found."""
    part = parts.PARTS[name]
    kept: dict[str, Any] = {}

    def keep(figures: dict[str, Any]) -> None:
        kept.update(figures)
        _write(arguments.child, asdict(Found(DRAFT, "", kept)))

    tempfile.tempdir = str(arguments.child.parent)  # what a killed part leaves goes with its parent's folder
    try:
        here = machine.this()
        tools = machine.build(here, arguments.build)
        clock = Clock(arguments.limit * CLOCK_SHARE - (time.monotonic() - STARTED), keep)
        found = part.run(here, replace(tools, clock=clock), arguments.scale)
    except Skip as problem:
        found = Found("skipped", str(problem), kept)
    except Exception as error:
        _write(arguments.child, asdict(Found("error", f"{type(error).__name__}: {error}", kept)))
        raise
    _write(arguments.child, asdict(found))
    return 0


def _write_part(folder: Path, document: dict[str, object]) -> None:
    _write(folder / f"gpu-{machine.slug(str(document['device']))}-{document['part']}.json", document)


def _write(path: Path, document: object) -> None:
    """In one step: whoever reads it, or is cut short, has the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(document, indent=2) + "\n")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
