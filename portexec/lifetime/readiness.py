"""Readiness: when a command counts as ready, and waiting for it. One function for each form of `--ready`.

listen  with `guard` the moment of the admitted listen(2); else the kernel's own list, never by connecting
accept  a connection of ours waits in the backlog until the command has accepted it
http    a GET on the first listener is answered with a status under 500
notify  READY=1 on NOTIFY_SOCKET, sd_notify(3)
none    at once
"""

from __future__ import annotations

import time

from portexec.binding import tables
from portexec.binding.listeners import Listener, covers
from portexec.lifetime.probe import FIRST_BAD_STATUS, Probe
from portexec.lifetime.start import Start
from portexec.parent.loop import Event, first, sleep
from portexec.procfs import descendants
from portexec.request import ACCEPT, HTTP, LISTEN, NOTIFY, Ready

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
        ready: Ready,
        listeners: Sequence[Listener],
        start: Start,
        *,
        is_admitted: bool,
        is_shared: Callable[[], bool],
    ) -> None:
        self.ready = ready
        self.all = listeners
        self.listeners = [listener for listener in listeners if listener.kind != "udp"]
        self.start = start
        self.is_admitted = is_admitted
        self.is_shared = is_shared
        numbers = [listener.port for listener in self.listeners]
        self._shared_numbers = {number for number in numbers if numbers.count(number) > 1}
        self._missing = list(self.listeners)  # those that are not ready yet
        self._began = time.monotonic()

    async def wait(self) -> None:
        """Return when the command is ready."""
        form = self.ready.form
        if form == NOTIFY:
            await self.start.said.is_ready.wait()
        elif form == LISTEN:
            for listener in self.listeners:
                await self._listening(listener)
        elif form == ACCEPT:
            if self.listeners:
                await first(*(self._accepts_like_all(listener) for listener in self.listeners))
        elif form == HTTP:
            await self._answers(self.listeners[0])

    def followed(self) -> list[Listener]:
        """The listeners at the addresses at which the command really listens, also where nobody asked for them."""
        return [self._at(listener) for listener in self.all]

    def _at(self, listener: Listener) -> Listener:
        is_followed = listener.socket is None and listener.kind == "tcp"
        return listener.at(self._hosts(listener)) if is_followed else listener

    def what(self) -> str:
        """What is waited for, in words that follow `waiting for the command to`."""
        if self.ready.form == NOTIFY:
            said = f" (it says: {self.start.said.status})" if self.start.said.status else ""
            return f"send READY=1 to $NOTIFY_SOCKET{said}"
        if self.ready.form == HTTP:
            return f"answer GET {self.listeners[0].url}{self.ready.argument} with a status under 500"
        missing, verb = self._missing, "accept a connection"
        if self.ready.form == LISTEN:
            missing, verb = [listener for listener in self.listeners if not self._is_listening(listener)], "listen"
        missing = missing or self.listeners  # it does by now
        return f"{verb} on {', '.join(listener.path or f'{listener.host}:{listener.port}' for listener in missing)}"

    async def _listening(self, listener: Listener) -> Listener:
        """Wait until the command listens; where it does. For the descriptors that we pass on, that is so from the start."""
        while listener.socket is None and not self._is_listening(listener):
            await (self.start.hears_more() if self.is_admitted else self._pause())
        return self._at(listener)

    def _is_listening(self, listener: Listener) -> bool:
        """Where binds are admitted, nobody else's listener counts."""
        return bool((not self.is_admitted or listener.port in self.start.hosts) and self._hosts(listener))

    def _hosts(self, listener: Listener) -> list[str]:
        """Where the command listens, as admission saw, or else the kernel tells.

        On a number that two listeners share, each has to get the address that it was given.
        """
        living = tables.listening_hosts(listener.port)
        seen = [host for host in self.start.hosts.get(listener.port, ()) if host]
        # An address where it does not listen any more is forgotten: it was looked at, and another one was taken.
        hosts = [host for host in seen if any(covers(host, one) or covers(one, host) for one in living)] if seen else living
        if listener.port in self._shared_numbers:
            return [host for host in hosts if covers(host, listener.host.strip("[]"))]
        return hosts

    async def _accepts_like_all(self, listener: Listener) -> None:
        """Return when it accepts and no other one is missing."""
        await self._accepts(listener)
        if self._missing:
            await Event().wait()  # for the others

    async def _accepts(self, listener: Listener) -> None:
        while True:
            with Probe(await self._listening(listener)) as probe:
                if await self._is_connected(probe) and await self._is_accepted(probe):
                    break
            await sleep(_RETRY)
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
        return descendants(self.start.shim.pid)

    async def _answers(self, listener: Listener) -> None:
        """Ask until there is an answer. Some accept only who asks (TCP_DEFER_ACCEPT), so that is not waited for first."""
        while True:
            with Probe(await self._listening(listener)) as probe:
                asked = self._ask(probe)
                if await first(asked, within=_LONGEST_ANSWER) == 0 and probe.status < FIRST_BAD_STATUS:
                    return
            await sleep(_RETRY)

    async def _ask(self, probe: Probe) -> None:
        if await self._is_connected(probe) and (not self.is_shared() or await self._is_accepted(probe)):
            await probe.get(self.ready.argument)

    async def _pause(self) -> None:
        shortest = max(_SHORTEST_POLL, _POLL_FOR_EACH * len(self.listeners))
        await sleep(max(shortest, (time.monotonic() - self._began) / _POLLS))
