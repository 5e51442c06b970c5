"""Readiness: when a command counts as ready, and waiting for it. One function for each form of `--ready`.

listen  with `guard`, admission tells; else the kernel's list of listeners. We never connect, and a mere look does not count
accept  a connection of ours waits in the backlog until the command has accepted it
http    a GET on the first listener is answered with a status under 500; one for a path that was given, with 2xx or 3xx
https   the same over TLS
notify  READY=1 on NOTIFY_SOCKET, sd_notify(3)
none    at once
"""

from __future__ import annotations

import os
import time

from portexec.admission.settle import staying
from portexec.binding import tables
from portexec.binding.listeners import Listener, covers
from portexec.lifetime import get
from portexec.lifetime.probe import Probe
from portexec.lifetime.start import Start
from portexec.lifetime.waits import can_tell, is_awaited
from portexec.parent.loop import Event, first, sleep
from portexec.procfs import descendants
from portexec.request import ACCEPT, HTTPS, LISTEN, NOTIFY, WEB_FORMS, Ready

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_RETRY = 0.05  # seconds after an attempt that came too early
_LONGEST_RETRY = 0.5  # between two GETs: a server writes a line about each
_GROWTH = 1.2  # of the pause with each GET, so that the wait is at most a fifth too long
BAD_PATH = 400  # the first status that is no answer for a path that was given
BAD_SERVER = 500  # the first that is never one
_FIRST_ANSWER = 5.0  # seconds for one GET; then another is tried, since a connection can be lost
_LONGEST_ANSWER = 30.0  # each GET after one without an answer has twice the time, up to this
_LONG_SILENCE = 1.0  # seconds; after them a GET without an answer says more than the one before
_LONGEST_HANDSHAKE = 1.0
_SHORTEST_POLL = 0.002  # seconds between two looks
_POLL_FOR_EACH = 0.0002  # seconds for each listener, where that is longer
_POLLS = 1000  # a pause is at least this part of the time that we have waited, so that long waits cost little


class Readiness:
    """How one start of a command becomes ready. The module `unready` has the words for a start that is not.

    `is_shared` tells whether another start accepts from the same sockets now, so that it matters who has accepted.
    `missing` are the listeners that have accepted nothing yet.
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
        self.missing = list(self.listeners)
        self._began = time.monotonic()
        self.path = ready.argument or "/"
        self._asked: get.Get | None = None  # the last GET that is over and has shown something
        self._asking: get.Get | None = None  # the GET under way
        self.does_speak_tls = False  # though the GETs are without TLS
        self._unheard = 0  # the GETs without a status after which the server may expect TLS

    async def wait(self) -> None:
        """Return when the command is ready. Raises OSError where there is no descriptor or no memory to look with."""
        form = self.ready.form
        if form in (ACCEPT, *WEB_FORMS):
            await self._take_clients()
        if form == NOTIFY:
            await self.start.said.is_ready.wait()
        elif form == LISTEN:
            await self._serves()
        elif form == ACCEPT:
            if self.listeners:
                await first(*(self._accepts_like_all(listener) for listener in self.listeners))
        elif form in WEB_FORMS:
            await self._answers(self.listeners[0])

    def followed(self) -> list[Listener]:
        """The listeners at the addresses at which the command really listens, also where nobody asked for them."""
        return [self._at(listener) for listener in self.all]

    def _at(self, listener: Listener) -> Listener:
        is_followed = listener.socket is None and listener.kind == "tcp"
        try:
            return listener.at(self._hosts(listener)) if is_followed else listener
        except OSError:
            return listener

    def last_get(self) -> get.Get | None:
        """The GET that tells what the command does now, if any does."""
        if self._asking is None or not self._asking.text():
            return self._asked
        return self._asked if self._asked is not None and self._asking.seconds() < _LONG_SILENCE else self._asking

    def not_listening(self) -> list[Listener]:
        """The listeners on which the command does not listen now."""
        try:
            return [listener for listener in self.listeners if not self._is_listening(listener, is_told=self.is_admitted)]
        except OSError:
            return []

    async def _take_clients(self) -> None:
        """Beside an old start, let clients come when this one waits for them on each listener of its own."""
        succession = self.start.succession
        if succession is None or not succession.own():
            return
        inodes = [os.fstat(new.socket.fileno()).st_ino for _, new in succession.own() if new.socket is not None]
        while can_tell() and not all(is_awaited(self.processes(), inode) for inode in inodes):
            await sleep(_RETRY)
        succession.take_clients()

    async def _serves(self) -> None:
        """Wait until a server listens on each listener. The descriptors that we pass on listen from the beginning.

        Where binds are admitted, admission tells of a server's listen only. Elsewhere looks have to be sorted out here.
        """
        for listener in self.listeners:
            await self._listens(listener, is_told=self.is_admitted)
        while not self.is_admitted and not await self._have_servers():
            await self._pause()

    async def _listens(self, listener: Listener, *, is_told: bool = False) -> None:
        """Wait until the command listens, if only to look. `is_told`: wait until admission tells of it."""
        while listener.socket is None and not self._is_listening(listener, is_told=is_told):
            await (self.start.addresses.grow() if is_told else self._pause())

    async def _listening(self, listener: Listener) -> Listener:
        """Wait until the command listens. Returns the listener at the address where it does."""
        await self._listens(listener)
        return self._at(listener)

    async def _have_servers(self) -> bool:
        """Whether a server listens on each number, and not merely a look. Called where binds are not admitted."""
        found = [self._found(listener) for listener in self.listeners if listener.socket is None]
        serving = await staying({inode: port for each in found for inode, port in each.items()})
        return not any(serving.isdisjoint(each) for each in found)

    def _found(self, listener: Listener) -> dict[int, int]:
        """The inodes of the command's sockets that listen on this number, with the number."""
        hosts = self._hosts(listener)
        return {inode: listener.port for inode, host in tables.listeners_on(listener.port).items() if host in hosts}

    def _is_listening(self, listener: Listener, *, is_told: bool) -> bool:
        """Whether somebody listens who can be the command. Where binds are admitted, nobody else can listen there."""
        return bool((not is_told or listener.port in self.start.addresses.hosts) and self._hosts(listener))

    def _hosts(self, listener: Listener) -> list[str]:
        """The addresses where the command listens, by admission, or else by the kernel's list.

        On a number that two listeners share, only addresses that cover the listener's own count.
        """
        seen = [host for host in self.start.addresses.hosts.get(listener.port, ()) if host]
        try:
            living = tables.listening_hosts(listener.port)
        except OSError:
            if not seen:
                raise
            living = seen
        # An address where it does not listen any more is left out: it was a look, and the command has taken another one.
        hosts = [host for host in seen if any(covers(host, one) or covers(one, host) for one in living)] if seen else living
        if listener.port in self._shared_numbers:
            return [host for host in hosts if covers(host, listener.host.strip("[]"))]
        return hosts

    async def _accepts_like_all(self, listener: Listener) -> None:
        """Return when the command accepts from this listener, and from all others."""
        await self._accepts(listener)
        if self.missing:
            await Event().wait()  # for the others

    async def _accepts(self, listener: Listener) -> None:
        while True:
            with Probe(await self._listening(listener)) as probe:
                if await self._is_connected(probe) and await self._is_accepted(probe):
                    break
            await sleep(_RETRY)
        self.missing.remove(listener)

    async def _is_connected(self, probe: Probe) -> bool:
        try:
            await probe.connect()
        except OSError:
            return False
        return True

    async def _is_accepted(self, probe: Probe) -> bool:
        """Wait until this start of the command has accepted the connection. False if the connection is over."""
        while (is_taken := probe.is_taken(self.processes if self.is_shared() else None)) is None:
            await self._pause()
        return is_taken

    def processes(self) -> set[int]:
        """All processes of the start."""
        return descendants(self.start.shim.pid)

    async def _answers(self, listener: Listener) -> None:
        """Ask until there is an answer. Accept is not waited for: some servers accept only who sends (TCP_DEFER_ACCEPT)."""
        get.prepare(is_tls=self.ready.form == HTTPS)
        pause, patience = _RETRY, _FIRST_ANSWER
        while True:
            now = await self._listening(listener)
            with Probe(now) as probe:
                asked = await first(self._ask(probe), within=patience)
            patience = min(2 * patience, _LONGEST_ANSWER) if asked is None else _FIRST_ANSWER
            if self._asking is not None and self._asking.text():
                self._asked = self._asking
            self._asking = None
            if asked == 0 and self._asked is not None:
                if 0 < self._asked.status < (BAD_PATH if self.ready.argument else BAD_SERVER):
                    return
                if self._asked.may_be_tls():
                    await first(self._look_for_tls(now), within=_LONGEST_HANDSHAKE)
            await sleep(pause)
            pause = min(pause * _GROWTH, _LONGEST_RETRY)

    async def _ask(self, probe: Probe) -> None:
        if await self._is_connected(probe) and (not self.is_shared() or await self._is_accepted(probe)):
            self._asking = get.Get(probe, self.path, is_tls=self.ready.form == HTTPS)
            await self._asking.ask()

    async def _look_for_tls(self, listener: Listener) -> None:
        """Find out whether a server expects TLS, at the first, second, fourth, eighth GET without an answer, and so on."""
        self._unheard += 1
        if self._unheard & (self._unheard - 1):
            return
        with Probe(listener) as probe:
            if await self._is_connected(probe) and await get.speaks_tls(probe):
                self.does_speak_tls = True

    async def _pause(self) -> None:
        shortest = max(_SHORTEST_POLL, _POLL_FOR_EACH * len(self.listeners))
        await sleep(max(shortest, (time.monotonic() - self._began) / _POLLS))
