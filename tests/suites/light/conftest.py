"""A fixture of each scope, which all start the same light server: $LIGHT is its command."""

from __future__ import annotations

import json
import os
import urllib.request

import pytest

LIGHT = json.loads(os.environ["LIGHT"])
SCOPES = ["session", "package", "module", "class", "function"]


def ask(server, path="/"):
    return urllib.request.urlopen(server.url + path).read().decode()


def of_scope(scope):
    @pytest.fixture(scope=scope, name=f"{scope}_server")
    def server(portexec_server_any_scope):
        return portexec_server_any_scope(LIGHT, env={"SCOPE": scope})

    return server


for scope in SCOPES:
    globals()[f"{scope}_server"] = of_scope(scope)
