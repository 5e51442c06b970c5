"""A FastAPI application that says which process answers."""

from __future__ import annotations

import os

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

app = FastAPI()


@app.get("/", response_class=PlainTextResponse)
async def hello() -> str:
    """Name the process."""
    return f"hello from {os.getpid()}"
