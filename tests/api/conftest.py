"""What all tests of `portexec.serve` have: a mark, by which it is seen that nothing is left, and the two event loops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.installed import need
from tests.support.serving import describe, is_host, marked, marking
from tests.support.waiting import wait_for


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """What `pytest.mark.anyio` runs a coroutine on."""
    need([request.param])
    return str(request.param)


@pytest.fixture(autouse=True)
def mark() -> Iterator[str]:
    """Mark all that a test starts, and fail it if any of that is left."""
    with marking() as text:
        yield text
        left = marked(text)
        hosts = {pid for pid in left if is_host(pid)}  # of callers that have ended; such a host ends a moment later
        others = describe(left - hosts)
        wait_for(lambda: not hosts & marked(text))
    assert others == []
