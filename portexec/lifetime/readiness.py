"""Readiness: when a command counts as ready, and waiting for it. One function for each form of `--ready`.

listen  with `guard` the moment of the admitted listen(2); else the kernel's own list, never by connecting
accept  a connection of ours waits in the backlog until the command has accepted it
http    a GET on the first listener is answered with a status under 500
notify  READY=1 on NOTIFY_SOCKET, sd_notify(3)
none    at once
"""

from __future__ import annotations

import time

import anyio

from portexec import request as supervision
from portexec.binding import tables
from portexec.binding.listeners import Listener, covers
from portexec.lifetime.probe import Probe
from portexec.lifetime.start import Generation
from portexec.parent import tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_RETRY = 0.05  # seconds between two attempts of which the first has shown that it is too early
_LONGEST_ANSWER = 30.0  # seconds for one GET; then another is tried
_SHORTEST_POLL = 0.002  # seconds between two looks; for many listeners so many times the next
_POLL_FOR_EACH = 0.0002
_POLLS = 1000  # and at least this part of what was waited so far, so that long waits cost little


class Readiness:
    """How one generation of a command becomes ready.

    `is_shared`: whether another generation accepts from the same sockets at the moment, so that it matters who has accepted.
    """

    def __init__(
        self,
        ready: supervision.Ready,
        listeners: Sequence[Listener],
        generation: Generation,
        *,
        is_admitted: bool,
        is_shared: Callable[[], bool],
    ) -> None:
        self.ready = ready
        self.listeners = [listener for listener in listeners if listener.kind != "udp"]
        self.generation = generation
        self.is_admitted = is_admitted
        self.is_shared = is_shared
        numbers = [listener.port for listener in self.listeners]
        self._shared_numbers = {number for number in numbers if numbers.count(number) > 1}
        self._missing = list(self.listeners)  # those that are not ready yet
        self._began = time.monotonic()

    async def wait(self) -> None:
        """Return when the command is ready."""
        form = self.ready.form
        if form == supervision.NOTIFY:
            await self.generation.said_ready.wait()
        elif form == supervision.LISTEN:
            for listener in self.listeners:
                await self._listens(listener)
        elif form == supervision.ACCEPT:
            async with anyio.create_task_group() as tasks:
                for listener in self.listeners:
                    tasks.start_soon(self._accepts, listener)
        elif form == supervision.HTTP:
            await self._answers(self.listeners[0])
        self.follow()

    def follow(self) -> None:
        """Take the addresses at which the command really listens, also where nobody asked for them."""
        for listener in self.listeners:  # admission may still be about to tell
            if listener.socket is None:
                listener.follow(self._hosts(listener))

    def what(self) -> str:
        """What is waited for, in words that follow `waiting for the command to`."""
        if self.ready.form == supervision.NOTIFY:
            said = f" (it says: {self.generation.status_text})" if self.generation.status_text else ""
            return f"send READY=1 to $NOTIFY_SOCKET{said}"
        if self.ready.form == supervision.HTTP:
            return f"answer GET {self.listeners[0].url}{self.ready.argument} with a status under 500"
        missing, verb = self._missing, "accept a connection"
        if self.ready.form == supervision.LISTEN:
            missing, verb = [listener for listener in self.listeners if not self._is_listening(listener)], "listen"
        missing = missing or self.listeners  # it does by now
        return f"{verb} on {', '.join(listener.path or f'{listener.host}:{listener.port}' for listener in missing)}"

    async def _listens(self, listener: Listener) -> None:
        """Wait until the command listens; for the descriptors that we pass on, that is so from the start."""
        if listener.socket is not None:
            return
        while not self._is_listening(listener):
            await (self.generation.hears_more() if self.is_admitted else self._pause())
        listener.follow(self._hosts(listener))

    def _is_listening(self, listener: Listener) -> bool:
        """Where binds are admitted, nobody else's listener counts."""
        return bool((not self.is_admitted or listener.port in self.generation.hosts) and self._hosts(listener))

    def _hosts(self, listener: Listener) -> list[str]:
        """Where the command listens, as admission saw, or else the kernel tells.

        On a number that two listeners share, each has to get the address that it was given.
        """
        seen = [host for host in self.generation.hosts.get(listener.port, ()) if host]
        hosts = seen or tables.listening_hosts(listener.port)
        if listener.port in self._shared_numbers:
            return [host for host in hosts if covers(host, listener.host.strip("[]"))]
        return hosts

    async def _accepts(self, listener: Listener) -> None:
        while True:
            await self._listens(listener)
            with Probe(listener) as probe:
                if await self._is_connected(probe) and await self._is_accepted(probe):
                    break
            await anyio.sleep(_RETRY)
        self._missing.remove(listener)

    async def _is_connected(self, probe: Probe) -> bool:
        try:
            await probe.connect()
        except OSError:
            return False
        return True

    async def _is_accepted(self, probe: Probe) -> bool:
        """Wait until the command, this generation of it, has accepted the connection. False where it is over."""
        while (is_taken := probe.is_taken(self._processes if self.is_shared() else None)) is None:
            await self._pause()
        return is_taken

    def _processes(self) -> set[int]:
        return tree.descendants(root=self.generation.shim.pid)

    async def _answers(self, listener: Listener) -> None:
        """Ask until there is an answer. Some accept only who asks (TCP_DEFER_ACCEPT), so that is not waited for first."""
        while True:
            await self._listens(listener)
            with Probe(listener) as probe, anyio.move_on_after(_LONGEST_ANSWER):
                is_asked = await self._is_connected(probe) and (not self.is_shared() or await self._is_accepted(probe))
                if is_asked and await probe.get(self.ready.argument) < 500:
                    return
            await anyio.sleep(_RETRY)

    async def _pause(self) -> None:
        shortest = max(_SHORTEST_POLL, _POLL_FOR_EACH * len(self.listeners))
        await anyio.sleep(max(shortest, (time.monotonic() - self._began) / _POLLS))
