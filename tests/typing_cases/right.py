"""Every public name in use, with the types that a user gets. Checked, never run."""

# pyright: strict

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from typing_extensions import assert_type

import portexec
from portexec import serve

assert_type(portexec.__version__, str)


def use_plainly(command: list[str | os.PathLike[str]]) -> None:
    serving = portexec.serve(command)
    assert_type(serving, portexec.Serving)
    with serving as server:
        assert_type(server, portexec.Server)
        assert_type(server.listeners, dict[str, portexec.Listener])
        assert_type(server.url, str)
        assert_type(server.host, str)
        assert_type(server.port, int)
        assert_type(server.pid, int)
        assert_type(server.output, str)
        assert_type(server.returncode, int | None)
        assert_type(server.died(patience=0.5), portexec.Exited | None)
        assert_type(server.address, tuple[str, int])
        assert_type(server.path, str)
        server.restart()
        server.start()
        server.stop()
        server.stop(signal=signal.SIGINT, timeout=2.5)
        assert_type(server.wait(timeout=2.5), int)
    for name, listener in server.listeners.items():
        assert_type(name, str)
        assert_type((listener.name, listener.url, listener.host, listener.port), tuple[str, str, str, int])
        assert_type(listener.path, str)


def use_every_option() -> None:
    portexec.serve(("sh", Path("script"), "{port}"), listen="127.0.0.1:0", hand_off="guard", cwd=".", kill_after=1)
    portexec.serve(["npm", "start"], listen=["web=0", "admin=0"], env={"A": "{url}", "B": None}, env_file=Path(".env"))
    portexec.serve(["npm", "start"], listen="*", host="node1")
    portexec.serve(["npm", "start"], listen={"web": "0"}, env_file=[".env", Path("more.env")], ready="http:/health")
    portexec.serve(["npm", "start"], remap=8000, inherit_env=False, restart="always", scheme="https", stop_signal=signal.SIGINT)
    portexec.serve(["npm", "start"], output=print, stdin=sys.stdin, lazy=True)
    portexec.serve(["npm", "start"], stdin=subprocess.DEVNULL)
    portexec.serve(["npm", "start"], remap=[8000, "8001=web"], ready=re.compile("^listening"), output=sys.stderr)
    portexec.serve(["npm", "start"], listen=None, env_file=None, ready=None, ready_timeout=2.5, cwd=Path.cwd())


async def use_async() -> None:
    async with serve(["npm", "start"]) as server:
        assert_type(server, portexec.AsyncServer)
        assert_type(server.url, str)
        assert_type(server.died(), portexec.Exited | None)
        await server.restart()
        await server.start()
        await server.stop()
        assert_type(await server.wait(), int)


async def use_own_socket() -> None:
    with portexec.listen("3000,0", backlog=10) as listener:
        assert_type(listener, portexec.GuardedSocket)
        assert_type(listener.url, str)
        as_socket: socket.socket = listener
        await asyncio.start_server(lambda reader, writer: writer.close(), sock=as_socket)
        assert_type(listener.detach(), int)
    portexec.listen().close()


def use_several(command: list[str]) -> None:
    serving = portexec.serve_all({"api": command, "web": portexec.serve(("npm", Path("start")), env={"API": "{api.url}"})})
    assert_type(serving, portexec.ServingAll)
    with serving as servers:
        assert_type(servers, dict[str, portexec.Server])


async def use_several_async() -> None:
    async with portexec.serve_all({"api": ["npm", "start"]}) as servers:
        assert_type(servers, dict[str, portexec.AsyncServer])


def use_names() -> None:
    assert_type(portexec.running(), list[portexec.NamedServer])
    found = portexec.find("web")
    assert_type(found, portexec.NamedServer)
    assert_type((found.name, found.project, found.state, found.pid, found.url), tuple[str, str, str, int, str])
    assert_type(found.command, list[str])
    assert_type(found.listeners, dict[str, portexec.Listener])
    assert_type(found.log, str | None)
    found.stop()


def use_errors() -> None:
    try:
        portexec.serve(["true"])
    except portexec.Exited as error:
        assert_type(error.returncode, int | None)
    except (portexec.NotReady, portexec.NotRunning, portexec.AlreadyEntered, portexec.ListenError) as error:
        assert_type(error.hint, str)
    except (portexec.CommandNotFound, portexec.CannotExecute) as error:
        assert_type(error.status, int)
    except (portexec.CommandNotAList, portexec.UnknownHandOff, portexec.UnknownReady) as error:
        as_usage: portexec.UsageError = error
        assert_type(as_usage.message, str)
    except portexec.StillRunning as error:
        as_timeout: TimeoutError = error
        print(as_timeout)
    except portexec.PortexecError as error:
        assert_type(error.output, str)


def use_fixture(portexec_server: portexec.ServerFactory) -> None:
    assert_type(portexec_server(["npm", "start"], ready="http"), portexec.Server)
    as_callable: Callable[..., portexec.Server] = portexec_server
    as_callable(["npm", "start"])


async def use_async_fixture(portexec_async_server: portexec.AsyncServerFactory) -> None:
    assert_type(await portexec_async_server(["npm", "start"], env={"A": "1"}), portexec.AsyncServer)
