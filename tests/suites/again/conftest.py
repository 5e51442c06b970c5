"""$LIGHT is the command of a light server."""

from __future__ import annotations

import json
import os
import urllib.request

import pytest

LIGHT = json.loads(os.environ["LIGHT"])


def ask(server, path="/"):
    return urllib.request.urlopen(server.url + path).read().decode()


@pytest.fixture(scope="session")
def site(portexec_server_any_scope):
    return portexec_server_any_scope(LIGHT)
