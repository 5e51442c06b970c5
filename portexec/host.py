"""The host: the portexec process that runs the servers of a Python program, see `portexec.api.host`.

    the program  -- one control socket -->  the host -> a shim for each server -> its command

The program drives the host as `portexec.control` says. Each server is a run (`lifetime.run`) and a part of one loop
(`parent.loop.isolated`). Its surroundings are put around each of its steps: its own directory, standard streams and umask, as
if it had a portexec of its own. An exception in a part ends that server, and no other.

The program owns the servers. The host ends when the program ends, which a pidfd tells, or when the program closes its end of
the socket. The socket alone would not do, since a forked child may have a copy. When the host is killed, each shim stops its
server.
"""

from __future__ import annotations

import _signal
import fcntl
import gc
import os
import sys
import termios

import portexec.parent.supervisor  # noqa: F401  # what shims need is imported once for all of them
from portexec import control, kernel, launch, options, start
from portexec.command.plan import template_values
from portexec.command.undo import Undo
from portexec.errors import STATUS_FAILURE, CloseOnError, PortexecError, UsageError, cannot, reason, shortage
from portexec.parent import loop, naming, possible, signals
from portexec.parent.family import Family
from portexec.parent.loop import Event, first, readable, spawn, writable
from portexec.request import Request
from portexec.say import say_bug
from portexec.surroundings import Home, Surroundings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from portexec.binding.listeners import Bound
    from portexec.start import Parent


class Client:
    """The program, as the run of one server sees it: a `Program` of `lifetime.program`."""

    def __init__(self, host: Host, id: int, output: int) -> None:
        self.kept = {host.fd}
        self._host = host
        self._id = id
        self._output = output
        self._asked: list[control.Request] = []
        self._news = Event()

    def tell(self, event: str, **fields: object) -> None:
        """Tell it an event."""
        if event == "ended":
            fields["unread"] = _unread(self._output)
        self._host.tell(event, id=self._id, **fields)

    def tell_error(self, error: PortexecError) -> bool:
        """Tell it an error."""
        self.tell("error", **control.error_fields(error))
        return True

    def tell_end(self) -> None:
        """Called in a shim whose host was killed: tell the program that nothing is left of the server."""
        control.tell_gone(self._host.fd, self._id)

    def take(self, request: control.Request) -> None:
        """The program asks for something."""
        self._asked.append(request)
        self._news.set()

    async def is_asking(self) -> None:
        """Return when the program asks for something."""
        await self._news.wait()

    async def asked(self) -> list[control.Request]:
        """What it asks for next."""
        await self._news.wait()
        self._news = Event()
        asked, self._asked = self._asked, []
        return asked

    def finish(self) -> None:
        """Nothing to do: the host itself sends what a slow program has not read."""


class Group:
    """Servers that are started together: the templates for all, when all are bound."""

    def __init__(self, size: int) -> None:
        self.templates: dict[str, str] = {}
        self.has_failed = False
        self.is_over = Event()  # all are bound, or one cannot be
        self._missing = size

    def add(self, templates: dict[str, str]) -> None:
        """One more is bound."""
        self.templates |= templates
        self._missing -= 1
        if self._missing == 0:
            self.is_over.set()

    def leave(self) -> None:
        """One of them ends. The others end, too, unless all were bound."""
        if not self.is_over.is_set():
            self.has_failed = True
            self.is_over.set()


class _Left(Exception):  # not an error: the server is not wanted any more
    """The server ends before it was started."""


class Hosted:
    """One server of a host, from the order to the last process gone."""

    def __init__(self, host: Host, order: control.Order, surroundings: Surroundings, group: Group) -> None:
        self.host = host
        self.group = group
        self.order = order
        self.surroundings = surroundings
        self.client = Client(host, order.id, surroundings.output)
        self.is_gone = Event()
        self.parent: Parent | None = None

    async def live(self) -> None:
        """Live to the end, whatever happens in between."""
        try:
            await loop.isolated(self._run(), self.surroundings)
        except Exception as error:
            await self._fail(error)
        self.surroundings.close()
        self.client.tell("gone")
        self.is_gone.set()

    async def _run(self) -> None:
        undo = Undo()
        launched = None
        try:
            self._require_directory()
            request = Request(options.parse(self.order.words), self.order.environment)
            choice, bound = launch.bind(request, undo)
            with CloseOnError(bound):
                templates = await self._templates(bound)
            launched = launch.plan(request, choice, bound, templates)
            require = self.surroundings.require_directory
            limits = self.order.limits
            self.parent = start.Parent(launched, self.host.family, program=self.client, limits=limits, before_start=require)
            self.parent.tell_outcome(await self.parent.run())
        except PortexecError as error:
            self.client.tell_error(error)
        except _Left:
            pass
        finally:
            self.group.leave()
            if self.parent is not None:
                self.parent.close()
            launch.give_back(launched, undo)

    async def _templates(self, bound: Bound) -> dict[str, str]:
        """The templates with a server's name, when all servers of the group are bound. Raises _Left."""
        name = self.order.name
        own = {f"{name}.{field}": value for field, value in template_values(bound.listeners, None).items() if "." not in field}
        self.group.add(own if name else {})
        await first(self.group.is_over.wait(), self.client.is_asking())
        if self.group.has_failed or not self.group.is_over.is_set():
            raise _Left
        return self.order.others | self.group.templates

    def _require_directory(self) -> None:
        try:
            self.surroundings.require_directory()
        except OSError as error:
            raise UsageError(f"the command's directory cannot be entered: {reason(error)}", "cwd names another") from error

    async def _fail(self, error: Exception) -> None:
        """End the server after an unexpected error: a shortage, or a bug. The shims stop what runs when their links close."""
        short = shortage(error)
        if short is None:
            with self.surroundings:
                short = PortexecError(say_bug(error))
        self.client.tell_error(short)
        if self.parent is not None:
            await self.parent.give_up()


class Host:
    """The host. `fd` is its end of the control socket. `why_not`: why it can run no server here; empty where it can."""

    def __init__(self, fd: int, why_not: str, family: Family, home: Home) -> None:
        self.fd = fd
        self.why_not = why_not
        self.family = family
        self.home = home
        self.servers: dict[int, Hosted] = {}
        self.groups: dict[int, Group] = {}  # by their numbers
        self.is_over = Event()
        self._events = control.Events(fd)
        self._requests = control.Requests(fd)
        self._is_behind = Event()

    async def live(self, program: int | None) -> None:
        """Live as long as the program does; `program` is its pidfd."""
        if not self.why_not:  # to read signals takes the C library
            spawn(self._follow_signals())
        spawn(self._follow_requests())
        spawn(self._catch_up())
        ends = [self.is_over.wait()]
        if program is not None:
            ends.append(self._ends(program))
        await first(*ends)
        self.is_over.set()  # orders that are still to be read come to nothing
        for server in self.servers.values():
            server.client.take(control.Request(control.STOP))
        while self.servers:
            await next(iter(self.servers.values())).is_gone.wait()
        self._events.finish()

    async def _ends(self, program: int) -> None:
        await readable(program)

    def tell(self, event: str, **fields: object) -> None:
        """Tell the program an event. If it has left too much unread, the host ends."""
        if not self._events.tell(event, **fields):
            self._is_behind.set()
        if self._events.is_full:
            self.is_over.set()

    async def _catch_up(self) -> None:
        while True:
            await self._is_behind.wait()
            while not self._events.flush():
                await writable(self.fd)
            self._is_behind = Event()

    async def _follow_requests(self) -> None:
        while not self._requests.is_over:
            await readable(self.fd)
            for request in self._requests.receive():
                self._take(request)
            self._requests.drop_descriptors()
        self.is_over.set()

    def _take(self, request: control.Request) -> None:
        if request.asked == control.SERVE:
            self._serve(request.id, self._requests.take_descriptors())
        elif request.id in self.servers:
            self.servers[request.id].client.take(request)
        elif request.id:
            self.tell("gone", id=request.id)

    def _serve(self, id: int, descriptors: list[int]) -> None:
        if id in self.servers:
            _close(descriptors)
            return
        try:
            server = self._make_server(id, descriptors)
        except PortexecError as error:
            _close(descriptors)
            self.tell("error", id=id, **control.error_fields(error))
            self.tell("gone", id=id)
            return
        self.servers[id] = server
        spawn(self._live(server))

    def _make_server(self, id: int, descriptors: list[int]) -> Hosted:
        """The server of an order. Raises PortexecError, with the descriptors left open."""
        order = control.Order.read(descriptors[0], id) if 3 <= len(descriptors) <= 4 else None
        if order is None or self.is_over.is_set():
            raise PortexecError("portexec does not understand the order")
        if self.why_not:
            raise start.no_parent(self.why_not)
        try:
            stdin = descriptors[3] if len(descriptors) > 3 else self.home.silence()
        except OSError as error:
            raise cannot("start the command", error) from error
        file, output, directory = descriptors[:3]
        os.close(file)
        return Hosted(self, order, Surroundings(self.home, directory, output, stdin, order.umask), self._group(order))

    def _group(self, order: control.Order) -> Group:
        """The group of an order; a group of its own where the order names none."""
        if not order.group:
            return Group(1)
        number, size = order.group
        if number not in self.groups or self.groups[number].is_over.is_set():
            self.groups = {each: group for each, group in self.groups.items() if not group.is_over.is_set()}
            self.groups[number] = Group(size)
        return self.groups[number]

    async def _live(self, server: Hosted) -> None:
        await server.live()
        del self.servers[server.order.id]

    async def _follow_signals(self) -> None:
        """Pass each signal on to every server."""
        while True:
            await readable(self.family.inbox)
            for signal in self.family.inbox.read():
                if signal.number == _signal.SIGCHLD:
                    self.family.reap()
                else:
                    self._pass_on(signal)

    def _pass_on(self, signal: signals.Received) -> None:
        for server in self.servers.values():
            run = None if server.parent is None else server.parent.living
            if run is not None:
                run.take_signal(signal)
            elif signal.number in signals.STOP_REQUESTS:
                server.client.take(control.Request(control.STOP))


def main(fd: int, program: int | None) -> NoReturn:
    """Be a host with this end of a control socket, for the program with this pidfd."""
    for descriptor in (fd, *([] if program is None else [program])):
        os.set_inheritable(descriptor, False)
    try:
        naming.name_front()
        why_not = possible.why_not()  # where it can be, orphans become ours from now on
        family = Family(signals.Inbox(), set(), set(), is_shared=True)
        kernel.raise_descriptor_limit()  # many servers take many; each command gets the limit of its own order
        gc.freeze()  # see `start.Parent`
        gc.enable()
        loop.run(Host(fd, why_not, family, Home()).live(program))
        os._exit(0)
    except BaseException as error:
        _tell_failure(fd, error)
    finally:
        os._exit(STATUS_FAILURE)


def _unread(pipe: int) -> int:
    """How many bytes are in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _tell_failure(fd: int, error: BaseException) -> None:
    """Tell the program the failure of the host, which ends all servers."""
    short = shortage(error)
    control.tell(fd, "failed", text=_described(error) if short is None else short.message)


def _described(error: BaseException) -> str:
    try:
        import traceback
    except (OSError, ImportError):  # there is no descriptor to load it with
        return repr(error)
    return "".join(traceback.format_exception(error))
