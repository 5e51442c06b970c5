"""Tests that fail: one the first time, of the death of its server; and one unless $GOOD is set."""

from __future__ import annotations

import os

from conftest import LIGHT, ask

pids = []


def test_good(site):
    assert ask(site) == f"hello from {site.pid}"


def test_flaky(portexec_server, site):
    server = portexec_server(LIGHT)
    pids.append(server.pid)
    if len(pids) == 1:
        ask(server, "/exit/3")
    assert ask(server) == f"hello from {pids[1]}"
    assert ask(site) == f"hello from {site.pid}"


def test_bad(site):
    ask(site, "/write/200")
    assert os.environ.get("GOOD")


def test_after(site):
    assert ask(site) == f"hello from {site.pid}"
