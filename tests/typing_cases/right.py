"""Every public name in use, with the types that a user gets. Checked, never run."""

# pyright: strict

from __future__ import annotations

import asyncio
import os
import socket
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
        server.restart()
        server.stop()
        assert_type(server.wait(), int)
    for name, listener in server.listeners.items():
        assert_type(name, str)
        assert_type((listener.name, listener.url, listener.host, listener.port), tuple[str, str, str, int])
        assert_type(listener.path, str)


def use_every_option() -> None:
    portexec.serve(("sh", Path("script"), "{port}"), listen="127.0.0.1:0", hand_off="guard", cwd=".", kill_after=1)
    portexec.serve(["npm", "start"], listen=["web=0", "admin=0"], env={"A": "{url}", "B": None}, env_file=Path(".env"))
    portexec.serve(["npm", "start"], listen={"web": "0"}, env_file=[".env", Path("more.env")], ready="http:/health")
    portexec.serve(["npm", "start"], listen=None, env_file=None, ready=None, ready_timeout=2.5, cwd=Path.cwd())


async def use_async() -> None:
    async with serve(["npm", "start"]) as server:
        assert_type(server, portexec.AsyncServer)
        assert_type(server.url, str)
        assert_type(server.died(), portexec.Exited | None)
        await server.restart()
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
    except portexec.PortexecError as error:
        assert_type(error.output, str)


def use_fixture(portexec_server: Callable[..., portexec.Server]) -> None:
    assert_type(portexec_server(["npm", "start"], ready="http"), portexec.Server)
