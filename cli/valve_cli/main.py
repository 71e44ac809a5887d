# SPDX-License-Identifier: Apache-2.0
"""`valve`: one command for everything on one machine.

Why it exists: the entry point only parses; each subcommand's module is imported when it is called, so that
`valve run` starts in milliseconds and the agent does not load what only the demo needs.

Threading model: none of its own. Called by the console script and by `python -m valve_cli.main`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

_BENCHES = {
    "preempt": "online turned busy to offline stopped, against a bare SIGSTOP",
    "reclaim": "memory in use taken from offline and given to online",
    "victims": "requests harmed per slab, against FIFO, LRU and random",
}

DESCRIPTION = """\
One device, one online LLM engine and several offline ones: offline computes while online is idle, and is
stopped within a millisecond when a request arrives."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    handler = {
        "agent": _agent, "run": _run, "demo": _demo, "bench": _bench, "policy": _policy, "status": _status,
        "doctor": _doctor, "top": _top, "explain": _explain, "drain-offline": _drain,
    }.get(arguments[0] if arguments else "")  # fmt: skip
    if handler is not None:
        return handler(arguments[1:])
    _help().parse_args(arguments or ["--help"])
    return 2


def _help() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="valve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in (
        ("agent", "the node agent: decides who computes and who has which memory"),
        ("run", "start a command as an online or offline tenant"),
        ("status", "what the agent knows now"),
        ("top", "every device and its tenants, live"),
        ("explain", "in a cluster: why is a pod paused, pending or refused"),
        ("drain-offline", "in a cluster: evict the offline pods of a node"),
        ("policy", "check a ColocationPolicy file"),
        ("doctor", "which device and route this machine gives, and what is missing"),
        ("bench", f"measure: {', '.join(_BENCHES)}"),
        ("demo", "two real LLM engines on one shared device, with a report"),
    ):
        commands.add_parser(name, help=text)
    return parser


def _version() -> str:
    from importlib.metadata import version

    return f"valve {version('valve')}"


def _agent(argv: list[str]) -> int:
    if "--status" in argv:
        return _status([argument for argument in argv if argument != "--status"])
    from valve_agent import main as agent

    parser = argparse.ArgumentParser(prog="valve agent", description="The node agent of one device.")
    agent.add_arguments(parser)
    return agent.main(parser.parse_args(argv))


def _run(argv: list[str]) -> int:
    from valve_cli import run

    return run.main(argv)


def _status(argv: list[str]) -> int:
    from valve_cli import status

    return status.main(argv)


def _top(argv: list[str]) -> int:
    return _delegate("valve_cli.top.main", argv)


def _explain(argv: list[str]) -> int:
    return _delegate("valve_cli.explain_main", argv)


def _drain(argv: list[str]) -> int:
    return _delegate("valve_cli.drain", argv)


def _policy(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="valve policy", description="Look at a ColocationPolicy file.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser("check", help="say everything that is wrong with FILE, or what it means")
    check.add_argument("file", metavar="FILE")
    arguments = parser.parse_args(argv)
    from valve_api.errors import PolicyError
    from valve_api.load import load_policy
    from valve_api.settings import settings_for

    try:
        policy = load_policy(arguments.file)
    except PolicyError as error:
        print(error, file=sys.stderr)
        return 2
    if policy.spec.cpu_device is None:
        print(f"{arguments.file}: policy {policy.metadata.name} is valid; its sizes follow each node's GPUs")
        return 0
    settings = settings_for(policy)
    print(
        f"{arguments.file}: policy {settings.policy}: "
        f"{settings.slabs} slabs of {settings.slab_bytes >> 20}Mi, "
        f"reservation {settings.reservation.min_slabs}..{settings.reservation.max_slabs} slabs, "
        f"lease {settings.lease_ns // 1_000_000}ms"
    )
    return 0


def _demo(argv: list[str]) -> int:
    return _delegate("valve_cli.demo.main", argv)


def _doctor(argv: list[str]) -> int:
    return _delegate("valve_cli.doctor", argv)


def _bench(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="valve bench", description="Measure one promise on this machine.")
    commands = parser.add_subparsers(metavar="BENCH", required=True)
    for name, text in _BENCHES.items():
        commands.add_parser(name, help=text, add_help=False)
    if not argv or argv[0] not in _BENCHES:
        parser.parse_args(argv or ["--help"])
    return _delegate(f"valve_cli.bench.{argv[0]}", argv[1:])


def _delegate(module: str, argv: list[str]) -> int:
    """Call `main(argv)` of a module that is only loaded when it is wanted."""
    loaded: Any = importlib.import_module(module)
    return int(loaded.main(argv) or 0)


if __name__ == "__main__":
    sys.exit(main())
