# SPDX-License-Identifier: Apache-2.0
"""kopf's part: watches, and the registry that its handlers live in. Handlers only put what they see into the
cache.

Why nothing more happens here: a handler of a change is edge-triggered, and an edge that is missed while no
operator runs stays missed. kopf writes nothing to any object: `on.event` needs neither finalizers nor
annotations, so a missing operator blocks no deletion.

Every replica watches, the leader or not: a standby's World is warm, and admission may read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import kopf
from kubernetes.aio.client import Configuration

from valve_api.names import GROUP
from valve_operator.api import PODS
from valve_operator.cache import WATCHED, Cache
from valve_operator.webhook import Webhook

SERVER_TIMEOUT_S: Final = 600
"""How long a watch request lasts; the API server ends it, and the next resumes where it ended."""
INACTIVITY_S: Final = 70
CONNECT_S: Final = 10
REQUEST_S: Final = 60


class Forgetful(kopf.DiffBaseStorage):
    """Keeps no past of any object. kopf copies and compares every object it sees for handlers of changes;
    there are none here, and a thousand agents report all the time."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        raise AssertionError("kopf stores nothing without handlers of changes")


def registry(cache: Cache, made: Configuration, webhook: Webhook | None) -> kopf.OperatorRegistry:
    """Handlers of the watches, of admission where it is served, and the login."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await _login(made)

    for kind in WATCHED:
        group, _, version = kind.group.rpartition("/")
        _watch(handlers, cache, kind.name, group, version, kind.plural)
    if webhook is not None:
        webhook.register(handlers)
    return handlers


def settings(webhook: Webhook | None) -> kopf.OperatorSettings:
    """kopf's settings, each where its default does not fit."""
    made = kopf.OperatorSettings()
    made.posting.enabled = False  # our events are deduplicated by their names
    made.scanning.disabled = True  # the CRDs are there before the operator; no rights on CRDs and namespaces
    made.watching.server_timeout = SERVER_TIMEOUT_S
    made.watching.inactivity_timeout = INACTIVITY_S
    made.watching.connect_timeout = CONNECT_S
    made.watching.chunk_size = 500
    made.watching.label_selectors[PODS.plural] = PODS.selector
    made.networking.connect_timeout = CONNECT_S
    made.networking.request_timeout = REQUEST_S
    made.execution.default_backoff = 5
    made.execution.max_workers = 1  # no handler of ours is synchronous
    made.persistence.finalizer = f"{GROUP}/never-used"
    made.persistence.diffbase_storage = Forgetful()
    made.admission.managed = None  # the chart writes the webhook configurations
    if webhook is not None:
        made.admission.server = webhook.server
    return made


def _watch(
    handlers: kopf.OperatorRegistry, cache: Cache, kind: str, group: str, version: str, plural: str
) -> None:
    @kopf.on.event(group, version, plural, id=f"see-{plural}", registry=handlers)
    async def see(type: str | None, body: kopf.Body, **_: Any) -> None:
        cache.told(kind, dict(body), deleted=type == "DELETED")


async def _login(made: Configuration) -> kopf.ConnectionInfo:
    """The same credentials as the client's; read anew, for tokens expire."""
    header = await made.get_api_key_with_prefix("BearerToken") or ""
    scheme, _, token = header.partition(" ")
    return kopf.ConnectionInfo(
        server=made.host,
        ca_path=made.ssl_ca_cert,
        insecure=not made.verify_ssl,
        scheme=scheme or None,
        token=token or None,
        certificate_path=str(Path(made.cert_file)) if made.cert_file else None,
        private_key_path=str(Path(made.key_file)) if made.key_file else None,
    )
