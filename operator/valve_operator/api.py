# SPDX-License-Identifier: Apache-2.0
"""The few requests that the operator makes, over the official client's transport (`kubernetes.aio`).

Writes are server-side apply under one field manager, so that what others put on the same objects stays. Every
failure is an ApiError that names the request. Nothing is retried here: executor.py does that, and knows when.
Called from the event loop's thread only.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from valve_api.names import (
    API_VERSION,
    GROUP,
    LABEL_WORKLOAD,
    PLURAL_NODE,
    PLURAL_POLICY,
    VERSION,
    Workload,
)
from valve_operator.errors import ApiError, ConfigError, error_of

FIELD_MANAGER: Final = "valve-operator"
REQUEST_TIMEOUT_S: Final = 30.0
PAGE: Final = 200
"""Objects per list request; bounds the memory that one answer takes."""
METADATA_ONLY: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
APPLY: Final = "application/apply-patch+yaml"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """Where objects of a kind are found. namespace: "" for cluster-scoped and for all namespaces."""

    name: str
    group: str
    plural: str
    namespace: str = ""
    selector: str = ""

    def path(self, name: str = "", namespace: str = "") -> str:
        """The URL's path of the list or of one object."""
        head = f"/apis/{self.group}" if "/" in self.group else f"/api/{self.group}"
        namespace = namespace or self.namespace
        middle = f"/namespaces/{namespace}" if namespace else ""
        return f"{head}{middle}/{self.plural}" + (f"/{name}" if name else "")


NODES = Kind("Node", "v1", "nodes")
POLICIES = Kind("ColocationPolicy", f"{GROUP}/{VERSION}", PLURAL_POLICY)
PODS = Kind("Pod", "v1", "pods", selector=f"{LABEL_WORKLOAD}={Workload.OFFLINE}")
"""Offline pods, as admission has labelled them."""
COLONODES = Kind("ColocationNode", f"{GROUP}/{VERSION}", PLURAL_NODE)


async def configuration(kubeconfig: Path | None) -> Configuration:
    """How to reach the API server: a kubeconfig, or the pod's service account. Raises ConfigError."""
    made = Configuration()
    try:
        if kubeconfig is None:
            config.load_incluster_config(client_configuration=made)
        else:
            await config.load_kube_config(str(kubeconfig), client_configuration=made)
    except config.ConfigException as error:
        where = f"{kubeconfig}: " if kubeconfig else "not in a pod, so give --kubeconfig FILE: "
        raise ConfigError(f"{where}{error}") from error
    return made


class Api:
    """Requests, counted in `requests` by verb."""

    def __init__(self, made: Configuration) -> None:
        self._client = ApiClient(made)
        self._client.user_agent = "valve-operator"
        self.requests: dict[str, int] = {}

    async def close(self) -> None:
        await self._client.close()

    async def get(self, kind: Kind, name: str, namespace: str = "") -> Json:
        """One object. Raises GoneError where it is not there."""
        return await self._call("GET", kind.path(name, namespace))

    def objects(self, kind: Kind) -> AsyncIterator[Json]:
        """Every object of a kind, a page at a time."""
        return self._pages(kind, "application/json")

    async def find(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        """One object by a list: needs no right but the watch's. None where it is not there."""
        query = {"fieldSelector": f"metadata.name={name}"}
        items = (await self._call("GET", kind.path("", namespace), None, query)).get("items")
        return {"apiVersion": kind.group, "kind": kind.name, **items[0]} if items else None

    def metadata(self, kind: Kind) -> AsyncIterator[Json]:
        """Only the metadata of every object of a kind: a tenth of the bytes."""
        return self._pages(kind, METADATA_ONLY)

    async def apply(self, kind: Kind, manifest: Json, subresource: str = "") -> Json:
        """Makes our fields of the object what the manifest says; creates it. Returns the object."""
        meta = manifest["metadata"]
        path = kind.path(meta["name"], meta.get("namespace", ""))
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        path += f"/{subresource}" if subresource else ""
        return await self._call("PATCH", path, manifest, query, content_type=APPLY)

    async def create(self, path: str, body: Json) -> Json:
        """POST to a collection or a subresource. Raises ConflictError where it exists."""
        return await self._call("POST", path, body)

    async def replace(self, path: str, body: Json) -> Json:
        """PUT; the body's resourceVersion must be the newest. Raises ConflictError where it is not."""
        return await self._call("PUT", path, body)

    async def delete(self, kind: Kind, name: str, uid: str, namespace: str = "") -> None:
        """Deletes the object with this uid. Raises GoneError, ConflictError (another uid by now)."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        await self._call("DELETE", kind.path(name, namespace), body)

    async def _pages(self, kind: Kind, accept: str) -> AsyncIterator[Json]:
        query = {"limit": str(PAGE)}
        if kind.selector:
            query["labelSelector"] = kind.selector
        while True:
            page = await self._call("GET", kind.path(), None, query, accept=accept)
            for item in page.get("items") or ():
                yield item
            token = page["metadata"].get("continue")
            if not token:
                return
            query = {**query, "continue": token}

    async def _call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Json:
        self.requests[method] = self.requests.get(method, 0) + 1
        request = f"{method} {path}"
        client = self._client
        headers = {"Content-Type": content_type, "Accept": accept}
        parameters = await client.param_serialize(
            method, path, {}, list((query or {}).items()), headers, body, [], {}, ["BearerToken"]
        )
        try:
            response = await client.call_api(*parameters, _request_timeout=REQUEST_TIMEOUT_S)
            text = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(request, 0, str(error) or type(error).__name__) from error
        if response.status >= 300:
            after = response.headers.get("Retry-After")
            seconds = float(after) if after and after.isdigit() else None
            raise error_of(request, response.status, _sentence(text), seconds)
        answer: Json = json.loads(text) if text else {}
        return answer


def colocation_node(name: str, spec: Json, owner_uid: str) -> Json:
    """The part of a ColocationNode that the operator owns."""
    owner = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": owner_uid}
    return {
        "apiVersion": API_VERSION,
        "kind": COLONODES.name,
        "metadata": {"name": name, "ownerReferences": [owner]},
        "spec": spec,
    }


def _sentence(text: bytes) -> str:
    """The message of a Status, or the beginning of whatever came instead."""
    try:
        status = json.loads(text)
    except ValueError:
        return text[:200].decode("utf-8", "replace")
    return (
        str(status.get("message") or status.get("reason") or status)
        if isinstance(status, dict)
        else str(status)
    )
