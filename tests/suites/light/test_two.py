"""Every scope, in classes; and unittest, which knows no fixtures. There are two such files."""

from __future__ import annotations

import unittest

import pytest
from conftest import LIGHT, SCOPES, ask

import portexec


class TestOne:
    @pytest.mark.parametrize("scope", SCOPES)
    def test_scope(self, scope, request):
        server = request.getfixturevalue(f"{scope}_server")
        assert ask(server) == f"hello from {server.pid}"
        assert ask(server, "/variable/SCOPE") == scope

    def test_numbers(self, session_server, package_server, module_server, class_server, function_server):
        servers = session_server, package_server, module_server, class_server, function_server
        assert len({server.port for server in servers}) == len(SCOPES)


class TestTwo:
    def test_numbers(self, session_server, module_server, class_server):
        assert ask(class_server) == f"hello from {class_server.pid}"
        assert len({session_server.port, module_server.port, class_server.port}) == 3


def test_plain(module_server, portexec_server):
    assert portexec_server(LIGHT).port != module_server.port


class TestCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        block = portexec.serve(LIGHT)
        cls.server = block.__enter__()
        cls.addClassCleanup(block.__exit__, None, None, None)

    def test_server(self):
        assert ask(self.server) == f"hello from {self.server.pid}"

    def test_again(self):
        self.server.restart()
        self.test_server()
