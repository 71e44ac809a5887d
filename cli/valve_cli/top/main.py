# SPDX-License-Identifier: Apache-2.0
"""`valve top`: every device and its tenants, live.

Why it exists: the question "who has the GPU, and is offline running" wants an answer at a glance.

On one machine it reads the agent's status socket, in a cluster (`kubectl valve top`, or --cluster) the
ColocationNode objects, which agents write at most every five seconds. On a terminal the screen renews itself
until ^C; into a pipe, with --once or with -o json it is written once.

Threading model: one thread. Called by valve_cli.main and the kubectl plugin.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from valve_agent import sockets
from valve_agent.kube.api import Api, KubeError, NotFound
from valve_cli import cluster
from valve_cli.status import StatusError, read_status
from valve_cli.top.screen import render
from valve_cli.top.view import Screen, from_node, from_status

INTERVAL_S = 1.0
_MEASURE_S = 0.5
"""How far apart the two looks are that give `--once` its rates."""


def main(argv: list[str], prog: str = "valve top", in_cluster: bool = False) -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Every device and its tenants, live.")
    if not in_cluster:
        parser.add_argument("--socket", type=Path, metavar="PATH", help="the agent's socket, on one machine")
        parser.add_argument("--cluster", action="store_true", help="all nodes of a cluster")
    parser.add_argument("--node", metavar="NAME", help="in a cluster: only this node")
    cluster.add_arguments(parser)
    parser.add_argument("--once", action="store_true", help="write it once, do not renew it")
    parser.add_argument(
        "--interval", type=float, default=INTERVAL_S, metavar="S", help="seconds between looks (default: 1)"
    )
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text", help="default: text")
    arguments = parser.parse_args(argv)
    if arguments.interval <= 0:
        parser.error(f"--interval {arguments.interval}: give a positive number of seconds")
    console = Console()
    live = not arguments.once and arguments.output == "text" and console.is_terminal
    try:
        if in_cluster or arguments.cluster or arguments.kubeconfig or arguments.node:
            look = cluster_screens(cluster.connect(arguments, os.environ), arguments.node)
        else:
            look = local_screens(arguments.socket or sockets.default_path(os.environ, os.getuid()))
        if live:
            renew(look, console, arguments.interval)
            return 0
        look()
        time.sleep(_MEASURE_S)
        write(look(), console, arguments.output)
    except (StatusError, KubeError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def local_screens(path: Path) -> Callable[[], Screen]:
    """A function that reads the machine's agent; from its second call on with rates. Raises StatusError."""
    before: dict[str, Any] = {}
    read_at = 0.0

    def look() -> Screen:
        nonlocal before, read_at
        status, now = read_status(path), time.monotonic()
        if before and before["pid"] != status["pid"]:
            before = {}  # another agent: its counters began anew
        views = from_status(status, platform.node(), before or None, now - read_at)
        before, read_at = status, now
        return Screen(views, tuple(f"{gpu}: {why}" for gpu, why in status["unusable"].items()))

    return look


def cluster_screens(api: Api, node: str | None) -> Callable[[], Screen]:
    """A function that reads the cluster's ColocationNodes, or one of them. Raises KubeError."""

    def look() -> Screen:
        if node is None:
            found = cluster.items(api, cluster.NODES_PATH)
        else:
            try:
                found = [api.get(f"{cluster.NODES_PATH}/{node}")]
            except NotFound:
                return Screen((), (f"{node}: no ColocationPolicy holds there (no such ColocationNode)",))
        devices, problems = [], []
        for one in sorted(found, key=lambda item: str(item["metadata"]["name"])):
            of_node, wrong = from_node(one)
            devices += of_node
            problems += wrong
        return Screen(tuple(devices), tuple(problems))

    return look


def renew(look: Callable[[], Screen], console: Console, interval_s: float) -> None:
    """Until ^C. An agent that goes away for a while is a line on the screen, not the end."""
    screen = look()
    with Live(render(screen), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            try:
                screen = look()
            except (StatusError, KubeError) as error:
                screen = Screen(screen.devices, (str(error),))
            live.update(render(screen), refresh=True)


def write(screen: Screen, console: Console, output: str) -> None:
    if output == "json":
        print(json.dumps(screen.as_json(), indent=2))
    else:
        console.print(render(screen))
