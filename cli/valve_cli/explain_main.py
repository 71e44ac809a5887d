# SPDX-License-Identifier: Apache-2.0
"""`valve explain POD`: fetches what explain.py reads, and prints its sentences.

Threading model: one thread. Called by valve_cli.main and kubectl.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from valve_agent.kube.api import Api, KubeError, NotFound
from valve_cli import cluster
from valve_cli.explain import Explanation, explain, explain_missing

_STYLES = {
    "running": "bold blue", "busy": "bold green", "idle": "green", "done": "green", "paused": "bold yellow",
    "pending": "bold yellow", "waiting": "bold yellow", "starting": "bold yellow", "failed": "bold red",
    "refused": "bold red", "unknown": "bold red",
}  # fmt: skip


def main(argv: list[str], prog: str = "valve explain") -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Why is a pod paused, pending or refused.")
    parser.add_argument("pod", metavar="POD", help="name, or namespace/name")
    parser.add_argument("-n", "--namespace", metavar="NAME", help="default: the context's")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text", help="default: text")
    cluster.add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        api = cluster.connect(arguments, os.environ)
        namespace, _, name = arguments.pod.rpartition("/")
        found = look(api, namespace or arguments.namespace or api.server.namespace, name)
    except KubeError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    if arguments.output == "json":
        print(json.dumps(found.as_json(), indent=2))
    else:
        Console().print(_text(found))
    return 1 if found.state == "missing" else 0


def look(api: Api, namespace: str, name: str) -> Explanation:
    """Raises KubeError."""
    base = f"/api/v1/namespaces/{namespace}"
    try:
        pod = api.get(f"{base}/pods/{name}")
    except NotFound:
        return explain_missing(f"{namespace}/{name}", cluster.items(api, f"{base}/events"))
    query = {"fieldSelector": f"involvedObject.name={name},involvedObject.uid={pod['metadata']['uid']}"}
    events = cluster.items(api, f"{base}/events", query)
    return explain(pod, cluster.items(api, cluster.NODES_PATH), events, datetime.now(UTC))


def _text(found: Explanation) -> Text:
    text = Text(f"{found.state}  ", _STYLES.get(found.state, "bold"))
    text.append(found.sentences[0] + "\n", "default")
    for sentence in found.sentences[1:]:
        text.append(f"  {sentence}\n", "default")
    for advice in found.advice:
        text.append("  → ", "bold").append(f"{advice}\n", "default")
    text.rstrip()
    return text
