#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Qualifies a GPU machine for Valve: asks it E1 to E16 and measures, one JSON file per part.

    make gpu                        every part
    make gpu PARTS=e1,e4            some
    python3 e2e/gpu/qualify.py --list

Why it exists: what nobody has run on hardware is only believed (docs/gpu.md). Each part runs in a process of
its own with a deadline, because a driver may hang; whatever happens, a part leaves a file that says so. It
changes no setting of the GPU, loads nothing and resets nothing.

Needs Python 3.11 or later, nvcc with its host compiler, and nothing else (`serving`: torch and transformers).
Threading model: none. Called by `make gpu`, and on the fake driver by tests/native/fakenv.

Exit status: 0 no part failed or broke; 1 some did; 2 nothing can be run here, or wrong usage.
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
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "node_agent")]

from qualification import machine, parts  # noqa: E402
from qualification.record import SCHEMA, Found, Skip  # noqa: E402

RESULTS = ROOT / "docs" / "results"


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
    names = list(parts.PARTS) if arguments.parts == "all" else arguments.parts.split(",")
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
    print(f"{here.device}, driver {here.driver}, Linux {here.kernel}")
    documents = [_run(parts.PARTS[name], here, arguments) for name in names]
    if arguments.bundle:
        _write(arguments.out / f"gpu-{machine.slug(here.device)}-parts.json", documents)
    return int(any(document["verdict"] in ("fail", "error") for document in documents))


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
    parser.add_argument("--bundle", action="store_true", help="one file with all parts instead of one each")
    parser.add_argument("--split", type=Path, metavar="FILE", help="make one file each of such a bundle")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _run(part: parts.Part, here: machine.Machine, arguments: argparse.Namespace) -> dict[str, object]:
    """One part in a process of its own; returns and writes its document."""
    began, utc = time.monotonic(), datetime.now(UTC)
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [
            sys.executable, str(Path(__file__).resolve()), "--parts", part.name,
            "--scale", str(arguments.scale), "--build", str(arguments.build), "--child", answer.name,
        ]  # fmt: skip
        process = subprocess.Popen(command, start_new_session=True)
        limit_s = arguments.limit or part.limit_s
        try:
            process.wait(limit_s)
            text = Path(answer.name).read_text()
            found = json.loads(text) if text else asdict(Found("error", f"ended with {process.returncode}"))
        except subprocess.TimeoutExpired:
            found = asdict(Found("error", f"did not end within {limit_s:g} s; its processes were killed"))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
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
    print(f"  {found['verdict']:8} {part.name:10} {found['answer']}", flush=True)
    if not arguments.bundle:
        _write_part(arguments.out, document)
    return document


def _child(name: str, arguments: argparse.Namespace) -> int:
    """Run the part here and write what it found."""
    part = parts.PARTS[name]
    try:
        here = machine.this()
        tools = machine.build(here, arguments.build)
        found = part.run(here, tools, arguments.scale)
    except Skip as problem:
        found = Found("skipped", str(problem))
    except Exception as error:
        found = Found("error", f"{type(error).__name__}: {error}")
        arguments.child.write_text(json.dumps(asdict(found)))
        raise
    arguments.child.write_text(json.dumps(asdict(found)))
    return 0


def _write_part(folder: Path, document: dict[str, object]) -> None:
    _write(folder / f"gpu-{machine.slug(str(document['device']))}-{document['part']}.json", document)


def _write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
