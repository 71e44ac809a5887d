# SPDX-License-Identifier: Apache-2.0
"""`kubectl valve`: the commands that speak to a cluster, as a kubectl plugin.

kubectl runs the program `kubectl-valve` of the PATH. Threading model: none. Called by the console script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    handler = _HANDLERS.get(arguments[0] if arguments else "")
    if handler is not None:
        return handler(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="kubectl valve", description="Online and offline pods on shared GPUs."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("top", help="every device and its tenants, live")
    commands.add_parser("explain", help="why is a pod paused, pending or refused")
    commands.add_parser("drain-offline", help="evict the offline pods of a node")
    parser.parse_args(arguments or ["--help"])
    return 2


def _top(argv: list[str]) -> int:
    from valve_cli.top import main as top

    return top.main(argv, prog="kubectl valve top", in_cluster=True)


def _explain(argv: list[str]) -> int:
    from valve_cli import explain_main

    return explain_main.main(argv, "kubectl valve explain")


def _drain(argv: list[str]) -> int:
    from valve_cli import drain

    return drain.main(argv, "kubectl valve drain-offline")


_HANDLERS: dict[str, Callable[[list[str]], int]] = {
    "top": _top, "explain": _explain, "drain-offline": _drain,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
