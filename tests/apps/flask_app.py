"""A Flask application that says which process answers."""

from __future__ import annotations

import os

from flask import Flask

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    """Name the process."""
    return f"hello from {os.getpid()}"
