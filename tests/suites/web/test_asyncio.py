"""With pytest-asyncio: the shared server, one of the test's own, and the loop goes on while that is started again."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import pytest_asyncio
from conftest import APPS, PATIENCE


@pytest.fixture(scope="session")
def gate(tmp_path_factory):
    """The server of the session starts when there is the file `open`, and makes the file `waiting` until then."""
    gate = tmp_path_factory.mktemp("gate")
    (gate / "open").touch()
    return gate


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def node(portexec_async_server_any_scope, gate):
    start = "until [ -e $GATE/open ]; do : >$GATE/waiting; sleep 0.01; done; exec node server.js"
    return await portexec_async_server_any_scope(["sh", "-c", start], cwd=APPS, env={"GATE": str(gate)})


@pytest.mark.asyncio
async def test_shared(fastapi_server):
    async with httpx.AsyncClient(base_url=fastapi_server.url, timeout=PATIENCE) as client:
        answers = await asyncio.gather(*[client.get("/") for _ in range(10)])
    assert {answer.text for answer in answers} == {f"hello from {fastapi_server.pid}"}


@pytest.mark.asyncio(loop_scope="session")
async def test_of_the_session(node, gate):
    async def open_gate():
        while not (gate / "waiting").exists():
            await asyncio.sleep(0)
        (gate / "open").touch()

    (gate / "open").unlink()
    before = node.pid
    opening = asyncio.create_task(open_gate())
    await node.restart()
    await opening
    assert node.pid != before


@pytest.mark.asyncio
async def test_own(portexec_async_server):
    server = await portexec_async_server(["gunicorn", "wsgi:app"], cwd=APPS)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        assert (await client.get("/")).text.startswith("hello from")
