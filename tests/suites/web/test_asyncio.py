"""With pytest-asyncio: the shared server, one of the test's own, and the loop goes on while that is started again."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import pytest_asyncio
from conftest import APPS


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def node(portexec_async_server_any_scope):
    return await portexec_async_server_any_scope(["node", "server.js"], cwd=APPS)


@pytest.mark.asyncio
async def test_shared(fastapi_server):
    async with httpx.AsyncClient(base_url=fastapi_server.url) as client:
        answers = await asyncio.gather(*[client.get("/") for _ in range(10)])
    assert {answer.text for answer in answers} == {f"hello from {fastapi_server.pid}"}


@pytest.mark.asyncio(loop_scope="session")
async def test_of_the_session(node):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    before = node.pid
    await node.restart()
    ticking.cancel()
    assert ticks > 100
    assert node.pid != before


@pytest.mark.asyncio
async def test_own(portexec_async_server):
    server = await portexec_async_server(["gunicorn", "wsgi:app"], cwd=APPS)
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/")).text.startswith("hello from")
