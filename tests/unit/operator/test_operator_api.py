# SPDX-License-Identifier: Apache-2.0
"""The client on a server of a few lines: what is sent, how answers become errors, pages.

Whether a real API server likes the requests is tested in tests/integration/operator.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from valve_operator.api import NODES, PODS, Api, Kind, colocation_node
from valve_operator.errors import ApiError, BusyError, ConflictError, GoneError

Handler = Callable[[web.Request], Awaitable[web.Response]]


def serve(handler: Handler, story: Callable[[Api], Awaitable[None]]) -> None:
    async def run() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        api = Api(Configuration(host=f"http://127.0.0.1:{port}", api_key={"BearerToken": "bearer secret"}))
        try:
            await story(api)
        finally:
            await api.close()
            await runner.cleanup()

    asyncio.run(run())


def test_an_apply_is_ours_and_forced() -> None:
    seen: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(
            method=request.method,
            path=request.path,
            query=dict(request.query),
            kind=request.content_type,
            token=request.headers["Authorization"],
            body=json.loads(await request.text()),
        )
        return web.json_response({"metadata": {"name": "n"}})

    async def story(api: Api) -> None:
        kind = Kind("ColocationNode", "valve.io/v1alpha1", "colocationnodes")
        assert await api.apply(kind, colocation_node("n", {"a": 1}, "u")) == {"metadata": {"name": "n"}}
        assert api.requests == {"PATCH": 1}

    serve(handler, story)
    assert (seen["method"], seen["path"]) == ("PATCH", "/apis/valve.io/v1alpha1/colocationnodes/n")
    assert seen["query"] == {"fieldManager": "valve-operator", "force": "true"}
    assert seen["kind"] == "application/apply-patch+yaml"
    assert seen["token"] == "bearer secret"
    assert seen["body"]["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"}
    ]


def test_a_deletion_names_the_uid() -> None:
    bodies = []

    async def handler(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.json_response({"status": "Success"})

    async def story(api: Api) -> None:
        await api.delete(NODES, "n", "u1")

    serve(handler, story)
    assert bodies[0]["preconditions"] == {"uid": "u1"}


ERRORS: list[tuple[int, type[ApiError]]] = [
    (404, GoneError),
    (409, ConflictError),
    (429, BusyError),
    (503, BusyError),
    (403, ApiError),
    (500, ApiError),
]


@pytest.mark.parametrize(("status", "kind"), ERRORS)
def test_an_answer_becomes_an_error_with_the_server_s_sentence(status: int, kind: type[ApiError]) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"message": "because"}, status=status, headers={"Retry-After": "7"})

    async def story(api: Api) -> None:
        with pytest.raises(kind, match=f"GET /api/v1/nodes/n answered {status}: because") as error:
            await api.get(NODES, "n")
        assert error.value.status == status
        if isinstance(error.value, BusyError):
            assert error.value.retry_after_s == 7

    serve(handler, story)


def test_an_answer_that_is_no_json_is_shown_as_it_is() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=502, text="<html>bad gateway</html>")

    async def story(api: Api) -> None:
        with pytest.raises(ApiError, match="answered 502: <html>bad gateway"):
            await api.get(NODES, "n")

    serve(handler, story)


def test_no_answer_is_an_error_too() -> None:
    async def story() -> None:
        api = Api(Configuration(host="http://127.0.0.1:1"))
        try:
            with pytest.raises(ApiError, match="got no answer"):
                await api.get(NODES, "n")
        finally:
            await api.close()

    asyncio.run(story())


def test_a_list_is_read_page_by_page_and_only_as_far_as_asked() -> None:
    asked = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        page = int(request.query.get("continue", "0"))
        more = {"continue": str(page + 1)} if page < 2 else {}
        return web.json_response({"metadata": more, "items": [{"metadata": {"name": f"n{page}"}}]})

    async def story(api: Api) -> None:
        names = [item["metadata"]["name"] async for item in api.metadata(PODS)]
        assert names == ["n0", "n1", "n2"]
        assert await api.find(NODES, "x") == {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n0"}}

    serve(handler, story)
    selector = {"limit": "200", "labelSelector": "valve.io/workload=offline"}
    assert asked[:3] == [selector, {**selector, "continue": "1"}, {**selector, "continue": "2"}]
    assert asked[3] == {"fieldSelector": "metadata.name=x"}
