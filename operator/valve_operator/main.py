# SPDX-License-Identifier: Apache-2.0
"""`python -m valve_operator`: flags, and the parts put together.

One process, one event loop, one thread of ours. Parts run as tasks of one group: when one ends, all end, and
the kubelet starts the operator again. SIGTERM gives the Lease up first, so that the other replica leads
within a second.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import kopf
from kubernetes.aio.client import Configuration

from valve_operator import health, watch
from valve_operator.admission import Defaults
from valve_operator.api import COLONODES, POLICIES, Api, Kind, configuration
from valve_operator.cache import Cache
from valve_operator.daemonsets import LABEL_MADE_BY, MADE_BY
from valve_operator.errors import ApiError, ConfigError
from valve_operator.executor import Executor
from valve_operator.lease import Leader, Timing
from valve_operator.loop import Loop, templates
from valve_operator.webhook import Webhook
from valve_operator.world import World
from valve_operator.writes import Writes

log = logging.getLogger("valve_operator")


def parser() -> argparse.ArgumentParser:
    """Every flag. The operator reads no environment but the service account's KUBERNETES_SERVICE_*."""
    made = argparse.ArgumentParser(prog="python -m valve_operator", description="Valve's operator.")
    add = made.add_argument
    add("--namespace", required=True, help="where DaemonSets, Lease and templates live")
    add("--node-templates", type=Path, required=True, help="folder with agent.yaml and device-plugin.yaml")
    add("--owner", required=True, help="ConfigMap that owns the DaemonSets: they go when it goes")
    add("--lease", default="valve-operator", help="name of the Lease that decides who leads")
    add("--identity", default=socket.gethostname(), help="this replica's name in the Lease")
    add("--kubeconfig", type=Path, help="how to reach the API server; default: the pod's service account")
    add("--webhook-port", type=int, default=0, help="port of admission; 0: none")
    add("--webhook-cert", type=Path, help="its certificate, PEM")
    add("--webhook-key", type=Path, help="its key, PEM")
    add("--webhook-address", help="where admission listens; default: every interface")
    add("--metrics-port", type=int, default=0, help="port of /metrics; 0: none")
    add("--health-port", type=int, default=0, help="port of /healthz and /readyz; 0: none")
    add("--online-priority-class", default="", help="for online pods that name none")
    add("--offline-priority-class", default="", help="for offline pods that name none")
    add(
        "--toleration",
        action="append",
        metavar="KEY",
        help="taint that pods of Valve tolerate; repeatable; default: nvidia.com/gpu",
    )
    add("--max-writes-per-second", type=float, default=200.0, help="spares the API server in a large cluster")
    add(
        "--lease-duration",
        type=float,
        default=15.0,
        metavar="S",
        help="a leader that is silent this long is replaced",
    )
    add("--log-level", choices=("debug", "info", "warning"), default="info")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 after SIGTERM, 2 where flags or files cannot be used."""
    options = parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    if options.log_level != "debug":  # kopf tells every handler call at INFO
        logging.getLogger("kopf").setLevel(logging.WARNING)
        logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    code = 0
    try:
        asyncio.run(operate(options))
    except* ConfigError as errors:
        for error in errors.exceptions:
            print(f"valve_operator: {error}", file=sys.stderr)
        code = 2
    return code


async def operate(options: argparse.Namespace) -> None:
    """Until SIGTERM or SIGINT. Raises ConfigError."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # until kopf runs, which takes them over
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    webhook = _webhook(options)
    made = await configuration(options.kubeconfig)
    api = Api(made)
    try:
        work = asyncio.create_task(_work(options, api, webhook, made, stopping))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if work.done():
            work.result()
        else:
            work.cancel()
            await asyncio.wait({work})
    finally:
        await api.close()


async def _work(
    options: argparse.Namespace,
    api: Api,
    webhook: Webhook | None,
    made: Configuration,
    stopping: asyncio.Event,
) -> None:
    selector = f"{LABEL_MADE_BY}={MADE_BY}"
    daemonsets = Kind("DaemonSet", "apps/v1", "daemonsets", options.namespace, selector)
    cache = Cache(World(), daemonsets, time.monotonic)
    clock = time.monotonic
    duration_s = options.lease_duration
    timing = Timing(duration_s, duration_s * 2 / 3, duration_s * 4 / 15)
    leader = Leader(
        api, options.namespace, options.lease, options.identity, clock, timing, lambda leads: loop.led(leads)
    )
    writes = Writes(api, daemonsets, options.identity, cache.seen, cache.gone)
    executor = Executor(writes, leader.leads, clock, rate=options.max_writes_per_second)
    loop = Loop(api, cache, executor, leader.leads)

    async def ready() -> str:
        if not loop.synced.is_set():
            return "the first census is not complete"
        if webhook is not None and not await health.accepts(webhook.port):
            return "the webhook does not listen yet"
        return ""

    figures = health.Figures(leader.leads, api, cache, executor, loop, webhook)
    async with asyncio.TaskGroup() as group:
        group.create_task(health.serve(options.health_port, options.metrics_port, ready, figures))
        await _crds(api)
        cache.world.templates = await templates(api, options.node_templates, options.namespace, options.owner)
        group.create_task(executor.run())
        group.create_task(loop.run())
        group.create_task(leader.run())
        group.create_task(_kopf(cache, made, webhook, options.identity, stopping))


async def _kopf(
    cache: Cache, made: Configuration, webhook: Webhook | None, identity: str, stopping: asyncio.Event
) -> None:
    """kopf takes the signals for itself and returns when one came; where it fails, it raises."""
    await kopf.operator(
        registry=watch.registry(cache, made, webhook),
        settings=watch.settings(webhook),
        standalone=True,
        clusterwide=True,
        # kopf would make one of the user's name, and an image need not know the name of its uid
        identity=cast(Any, identity),
    )
    stopping.set()


async def _crds(api: Api) -> None:
    """Waits until both kinds are served: kopf looks for them only once."""
    for kind in (POLICIES, COLONODES):
        while True:
            try:
                async for _ in api.metadata(kind):
                    pass
                break
            except ApiError as error:
                log.warning("waiting for the CRD of %s (crds/*.yaml): %s", kind.name, error)
                await asyncio.sleep(2)


def _webhook(options: argparse.Namespace) -> Webhook | None:
    if not options.webhook_port:
        return None
    for flag, path in (("--webhook-cert", options.webhook_cert), ("--webhook-key", options.webhook_key)):
        if path is None or not path.is_file():
            raise ConfigError(
                f"{flag} {path or 'is missing'}: --webhook-port needs a certificate and its key, PEM"
            )
    tolerations = ("nvidia.com/gpu",) if options.toleration is None else tuple(options.toleration)
    defaults = Defaults(options.online_priority_class, options.offline_priority_class, tolerations)
    return Webhook(
        options.webhook_port, options.webhook_cert, options.webhook_key, defaults, options.webhook_address
    )
