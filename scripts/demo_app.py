"""The demo's server: a FastAPI application with one page, which says who answers."""

import os

from fastapi import FastAPI

app = FastAPI()


@app.get("/hello")
def hello() -> dict[str, str | int]:
    """Greet, and tell which of the two processes this is."""
    return {"hello": "world", "port": int(os.environ["PORT"]), "pid": os.getpid()}
