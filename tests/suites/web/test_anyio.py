"""With anyio, on asyncio and on trio."""

from __future__ import annotations

import anyio
import httpx
import pytest
from conftest import APPS, PATIENCE

import portexec

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


@pytest.fixture(scope="module")
async def node(portexec_async_server_any_scope):
    return await portexec_async_server_any_scope(["node", "server.js"], cwd=APPS)


@pytest.fixture
async def block(anyio_backend):
    async with portexec.serve(["node", "server.js"], cwd=APPS) as server:
        yield server


async def test_shared(fastapi_server):
    async with httpx.AsyncClient(base_url=fastapi_server.url, timeout=PATIENCE) as client:
        assert (await client.get("/")).text == f"hello from {fastapi_server.pid}"


async def test_of_the_module(node):
    async with httpx.AsyncClient(base_url=node.url, timeout=PATIENCE) as client, anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(client.get, "/")


async def test_a_block(block, node):
    assert block.pid != node.pid
    async with httpx.AsyncClient(base_url=block.url, timeout=PATIENCE) as client:
        assert (await client.get("/")).text == f"hello from {block.pid}"
