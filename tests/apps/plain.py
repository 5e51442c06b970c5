"""An ASGI application that says which process answers, without a framework, which takes longer to import than the servers."""

from __future__ import annotations

import os


async def app(scope, receive, send):
    """Name the process."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": f"hello from {os.getpid()}".encode()})
