"""Wrong uses. Every line that ends with `# wrong` has to be an error, and no other line. Checked, never run."""

# pyright: strict

from __future__ import annotations

import re

import portexec


def serve_wrongly() -> None:
    portexec.serve()  # wrong
    portexec.serve(8000)  # wrong
    portexec.serve([b"npm"])  # wrong
    portexec.serve(["npm", 8000])  # wrong
    portexec.serve(["npm"], ["web=0"])  # wrong
    portexec.serve(["npm"], listen=8000)  # wrong
    portexec.serve(["npm"], listen={"web": 0})  # wrong
    portexec.serve(["npm"], hand_off=None)  # wrong
    portexec.serve(["npm"], env={"A": 1})  # wrong
    portexec.serve(["npm"], env_file=3)  # wrong
    portexec.serve(["npm"], ready=True)  # wrong
    portexec.serve(["npm"], ready_timeout="60s")  # wrong
    portexec.serve(["npm"], cwd=3)  # wrong
    portexec.serve(["npm"], kill_after=None)  # wrong
    portexec.serve(["npm"], timeout=3)  # wrong
    portexec.serve(["npm"], remap=8000.5)  # wrong
    portexec.serve(["npm"], ready=re.compile(b"x"))  # wrong
    portexec.serve(["npm"], output="log")  # wrong
    portexec.serve_all([["npm"]])  # wrong
    portexec.serve_all({"api": 8000})  # wrong
    portexec.serve_all({"api": ["npm"]}, cwd=".")  # wrong
    portexec.serve(["npm"], stdin=b"input")  # wrong
    portexec.serve(["npm"], lazy="no")  # wrong
    portexec.serve(["npm"], output=open("log", "wb"))  # wrong
    portexec.serve(["npm"], scheme=None)  # wrong
    portexec.no_such_function()  # wrong


def use_wrongly(serving: portexec.Serving, error: portexec.Exited) -> None:
    print(portexec.NoSuchName)  # wrong
    print(serving.url)  # wrong
    with serving as server:
        server.port = 8000  # wrong
        server.listeners["web"].port = 8000  # wrong
        server.restart(5)  # wrong
        server.stop(signal="INT")  # wrong
        server.wait(timeout="5s")  # wrong
        server.died("now")  # wrong
        print(server.returncode + 1)  # wrong
    print(error.returncode + 1)  # wrong


async def use_async_wrongly(serving: portexec.Serving, server: portexec.Server, other: portexec.AsyncServer) -> None:
    await server.stop()  # wrong
    async with server:  # wrong
        pass
    with other:  # wrong
        pass
    code: int = other.wait()  # wrong
    print(code)
    serving.__enter__().restart()
    async with serving as entered:
        plain: portexec.Server = entered  # wrong
        print(plain)


def listen_wrongly() -> None:
    portexec.listen(8000)  # wrong
    portexec.listen(["0"])  # wrong
    portexec.listen("0", 10)  # wrong
    portexec.listen(backlog="10")  # wrong
    with portexec.listen() as listener:
        listener.url = "http://127.0.0.1/"  # wrong


async def use_fixtures_wrongly(server: portexec.ServerFactory, async_server: portexec.AsyncServerFactory) -> None:
    server(["npm"], no_such_option=1)  # wrong
    server("npm", ["web=0"])  # wrong
    server(["npm"]).port = 8000  # wrong
    await server(["npm"])  # wrong
    await async_server(["npm"], no_such_option=1)  # wrong
    print(async_server(["npm"]).url)  # wrong
