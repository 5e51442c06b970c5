"""The demo's server: an ASGI application with one page, which says who answers."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any


async def app(scope: dict[str, Any], _: object, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Greet, and tell which of the two processes this is."""
    if scope["type"] != "http":
        return
    body = json.dumps({"hello": "world", "port": int(os.environ["PORT"]), "pid": os.getpid()}).encode() + b"\n"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})
