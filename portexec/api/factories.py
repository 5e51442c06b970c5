"""The types of the pytest fixtures, for annotations: what `portexec_server` and its like are called with, and give."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from portexec.api.driver import HasFileno
from portexec.api.serve import AsyncServer, Server, SupportsWrite


class ServerFactory(Protocol):
    """The fixtures `portexec_server` and `portexec_server_any_scope`: called as `portexec.serve`, give a running server."""

    def __call__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        listen: str | Sequence[str] | Mapping[str, str] | None = None,
        host: str | None = None,
        hand_off: str = "auto",
        remap: int | str | Sequence[int | str] | None = None,
        env: Mapping[str, str | None] | None = None,
        env_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        inherit_env: bool = True,
        ready: str | re.Pattern[str] | None = None,
        ready_timeout: float = 60.0,
        restart: str = "no",
        lazy: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        stdin: int | HasFileno | None = None,
        output: Callable[[str], object] | SupportsWrite | None = None,
        scheme: str = "http",
        stop_signal: int | None = None,
        kill_after: float = 5.0,
    ) -> Server:
        """Start a server. It is stopped at the end of the fixture that started it."""


class AsyncServerFactory(Protocol):
    """The fixtures `portexec_async_server` and `portexec_async_server_any_scope`: the same, to be awaited."""

    async def __call__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        listen: str | Sequence[str] | Mapping[str, str] | None = None,
        host: str | None = None,
        hand_off: str = "auto",
        remap: int | str | Sequence[int | str] | None = None,
        env: Mapping[str, str | None] | None = None,
        env_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        inherit_env: bool = True,
        ready: str | re.Pattern[str] | None = None,
        ready_timeout: float = 60.0,
        restart: str = "no",
        lazy: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        stdin: int | HasFileno | None = None,
        output: Callable[[str], object] | SupportsWrite | None = None,
        scheme: str = "http",
        stop_signal: int | None = None,
        kill_after: float = 5.0,
    ) -> AsyncServer:
        """Start a server without blocking the event loop. It is stopped at the end of the fixture that started it."""
