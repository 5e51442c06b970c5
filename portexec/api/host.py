"""The host of this process: one portexec that runs all its servers. This module starts the host and talks to it.

    driver   a server: what is known of it, and the calls that wait for it
    host     the process, the control socket, and one thread that takes what the host and the commands say

Portexec does its work in the host, and not in this process, which may have threads and a running event loop. The first server
starts the host as a program of its own (subprocess). The host stays for later servers, until this process ends. The thread
lives as long as there are servers.

A server gets what the caller has at the time of its start. What can be sent is sent with the order: words, environment,
directory, umask, soft limits. What else a process inherits is compared (`_Caller.inherited`). If it has changed, another host
is started, and the earlier one ends with its last server. A server whose start may keep its host waiting, such as for an answer
from DNS, has a host of its own.

A fork has no part in the host: its first server starts another one.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import errno
import fcntl
import os
import resource
import select
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from portexec import control
from portexec.errors import UsageError, reason
from portexec.plainjson import dumps, loads
from portexec.procfs import content, is_ending

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Protocol

    from portexec.errors import PortexecError

    class Driver(Protocol):
        """A server, as this module needs it (`driver`). We read its output from `output_fd`, None when no more will come."""

        name: str
        arguments: list[str]
        environment: dict[str, str]
        cwd: str | None
        output_fd: int | None
        is_ordered: bool

        def begin(self, host: Host, number: int, output: int) -> None:
            """A host is about to be told to serve it."""

        def name_in(self, error: PortexecError) -> None:
            """Put its name before the message of an error, where it is one of several."""

        def pass_on_stop(self) -> None:
            """Tell the host of a request to stop it that came before the order."""

        def may_block(self) -> bool:
            """Whether its start may keep the host busy for long."""

        def others(self) -> dict[str, str]:
            """Templates of the servers that it is started with."""

        def stdin(self) -> int | None:
            """A new descriptor of what the command reads; None for a silent pipe."""

        def take_output(self) -> bytes:
            """Take a piece of the output."""

        def look_for_events(self) -> None:
            """All events that the host has told by now are about to be taken."""

        def drain(self) -> None:
            """Take all output that is there now."""

        def close_output(self) -> None:
            """No more output will come."""

        def take_event(self, event: dict[str, Any]) -> None:
            """Take an event that the host tells of this server."""

        def end(self) -> None:
            """Nothing is left of it."""


__tracebackhide__ = True  # in pytest's tracebacks: what counts there is the line that called us

# The host imports this very portexec, and other packages from where the caller finds them. With `-I` and `-S` the standard
# library comes first on the path, so that no file of the caller's hides one of its modules. A caller may ignore or block the
# signals that end a server, and handle them in its own way; the server must not inherit that.
_PROGRAM = """\
import _signal, gc, sys
gc.disable()
for number in (_signal.SIGTERM, _signal.SIGINT):
    _signal.signal(number, _signal.SIG_DFL)
_signal.pthread_sigmask(_signal.SIG_SETMASK, [])
sys.path.insert(0, {!r})
import portexec
sys.path[:1] = []
sys.path += {!r}
from portexec import host
host.main({}, {})
"""
_FIRST_FREE_FD = 3
_AT_ONCE = 1 << 16  # bytes
_PATIENCE = 30.0  # seconds for a host that takes no requests, before it is killed
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
# Lines of /proc/PID/status that tell what a program inherits; SigIgn are the signals that it ignores.
_INHERITED = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Cpus_allowed", "Mems_allowed", "SigIgn")

# Held while descriptors are made that no child may inherit, and by each fork of Python's. An RLock, since the garbage collector
# may call code that forks, in the thread that holds it.
lock = threading.RLock()


class Host:
    """A host process, and the drivers of its servers by their numbers in the host."""

    def __init__(self, inherited: object, *, may_block: bool = False) -> None:
        """Start it. `may_block`: the start of a server may keep the host busy for long, so that it does not take requests.

        Raises OSError, and ValueError or TypeError where it is unknown which Python this is.
        """
        self.inherited = inherited
        self.may_block = may_block
        self.is_retired = False  # it gets no more servers
        self.failure = ""  # why it has failed, as it told
        self._drivers: dict[int, Driver] = {}
        self._count = 0
        self._thread: threading.Thread | None = None
        self._control, theirs = socket.socketpair()
        try:
            with theirs:
                for end in (self._control, theirs):
                    end.settimeout(None)  # the caller may have called socket.setdefaulttimeout
                self.process = _start(theirs)
        except BaseException:
            self._control.close()
            raise
        _hosts.add(self)

    def fileno(self) -> int:
        """Our end of the control socket; -1 when it is closed."""
        return self._control.fileno()

    def is_usable(self) -> bool:
        """Whether it can serve another server."""
        if self.is_retired or self.fileno() < 0 or self.process.poll() is not None or is_ending(self.process.pid):
            return False
        poll = select.poll()
        poll.register(self._control, 0)
        return not poll.poll(0)

    def serve(self, drivers: Sequence[Driver], caller: _Caller) -> None:
        """Tell it to serve these together, which the caller will wait for.

        Raises OSError, RuntimeError where no thread can be started, and UsageError as `require_other_thread`.
        """
        self.require_other_thread()
        group = [self._count + 1, len(drivers)] if len(drivers) > 1 else []
        for driver in drivers:
            try:
                self._serve(driver, caller, group)
            except UsageError as error:
                driver.name_in(error)
                raise

    def _serve(self, driver: Driver, caller: _Caller, group: list[int]) -> None:
        self._count += 1
        number = self._count
        ours: list[int] = []
        try:
            words, environment, others = driver.arguments, driver.environment, driver.others()
            order = control.Order(number, words, environment, caller.umask(), _limits(), driver.name, group, others)
            ours.append(_file_with(order.write()))
            output, end = os.pipe()
            ours.append(end)
            driver.begin(self, number, output)
            ours.append(_open_directory(driver.cwd))
            stdin = driver.stdin()
            ours += [] if stdin is None else [stdin]
            self._drivers[number] = driver
            self._start_thread()
        except BaseException:
            self._drivers.pop(number, None)
            driver.end()
            _close(ours)
            raise
        try:
            self.say({"do": control.SERVE, "id": number}, ours)
        finally:
            driver.is_ordered = True  # first, and whatever a signal handler of the caller's raises: it can be stopped now
            _close(ours)
        driver.pass_on_stop()

    def say(self, what: object, descriptors: Sequence[int] = ()) -> None:
        """Send it a request. A host that takes no request for a long time is killed. It is no error if it has ended."""
        data = dumps(what).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        poll = select.poll()
        while True:
            try:
                self._control.sendmsg([data], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
                return
            except BlockingIOError:
                if (fd := self.fileno()) < 0:
                    return
                poll.register(fd, select.POLLOUT)
                if not poll.poll(1000 * _PATIENCE):
                    self.kill()
                    return
            except OSError as error:
                if self.fileno() < 0 or error.errno in (errno.EPIPE, errno.ECONNRESET):
                    return  # the thread sees the end, too
                raise

    def kill(self) -> None:
        """Kill it; its shims stop the servers."""
        try:
            self.process.kill()
        except PermissionError:
            pass  # we have become another user meanwhile

    def is_own_thread(self) -> bool:
        """Whether the current thread is the host's, which takes all news, and so must not wait for any."""
        return threading.current_thread() is self._thread

    def require_other_thread(self) -> None:
        """Raise UsageError in the host's own thread: while that waits for news, nobody tells any."""
        if self.is_own_thread():
            raise UsageError("a function that is told the output cannot wait for a server", "have another thread wait for it")

    def forget(self) -> None:
        """In a forked child: let go of the host, which is the parent's."""
        self.is_retired = True
        self.process.returncode = 0  # it is not our child
        self._control.close()

    def has_ended(self) -> bool:
        """Whether it has ended and was waited for, and has no servers any more."""
        return not self._drivers and self.process.poll() is not None

    def retire(self) -> None:
        """Give it no more servers. It ends with its last one."""
        self.is_retired = True
        if not self._drivers:
            self._dismiss()

    def _dismiss(self) -> None:
        """Let it end. It sees shutdown(2), even if a child that C code has forked has a copy of our end of the socket."""
        with contextlib.suppress(OSError):  # it has ended already
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()

    # The thread.

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="portexec", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                raise

    def _follow(self) -> None:
        """Take all news as long as there are servers. A failure of our own ends them all, so that nobody waits for ever."""
        try:
            self._take_all()
        except Exception:
            import traceback

            self.failure = traceback.format_exc()
            self._end_all()

    def _take_all(self) -> None:
        """Take output and events as long as there are servers. The answer to an order wakes us to read its output, too."""
        readers: dict[int, Driver] = {}
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        rest = b""
        while self._has_servers():
            self._add_readers(readers, poll)
            for fd, _ in poll.poll():
                if fd in readers:
                    _read_output(fd, readers, poll)
            for driver in list(self._drivers.values()):
                driver.look_for_events()
            try:
                data = self._control.recv(_AT_ONCE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                data = b""  # the host was killed before it had read all
            if not data:
                self._end_all()
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line, readers, poll)

    def _add_readers(self, readers: dict[int, Driver], poll: select.poll) -> None:
        for driver in list(self._drivers.values()):
            if driver.output_fd is not None and driver.output_fd not in readers:
                readers[driver.output_fd] = driver
                poll.register(driver.output_fd, select.POLLIN)

    def _has_servers(self) -> bool:
        with lock:
            if self._drivers:
                return True
            self._thread = None
            if self.is_retired:
                self._dismiss()
        return False

    def _take(self, line: bytes, readers: dict[int, Driver], poll: select.poll) -> None:
        try:
            event = loads(line)
        except ValueError:
            return  # the host was killed in the middle of a line
        if event["event"] == "failed":
            self.failure = event["text"]
            return
        driver = self._drivers.get(event["id"])
        if driver is None:
            return
        driver.drain()  # the output from before the event comes before the event
        if event["event"] != "gone":
            driver.take_event(event)
            return
        if "orphaned" in event:
            self.process.wait()  # the host was killed: a shim tells so before we see the end of the socket
        if driver.output_fd in readers:
            poll.unregister(driver.output_fd)
            del readers[driver.output_fd]
        with lock:
            del self._drivers[event["id"]]
            is_last = not self._drivers
            if is_last:
                self._thread = None
                if self.is_retired or "orphaned" in event:
                    self._dismiss()
        if is_last and self.fileno() < 0:
            self.process.wait()  # the host ends, too: leave no process behind
        driver.end()

    def _end_all(self) -> None:
        """The host has ended, and so have all its shims."""
        with lock:
            drivers, self._drivers = list(self._drivers.values()), {}
            self.is_retired = True
            self._thread = None
            self._control.close()
        self.process.wait()
        for driver in drivers:
            driver.drain()
            driver.end()


class _Caller:
    """What a new process inherits from the calling thread."""

    def __init__(self) -> None:
        lines = (line.partition(":") for line in _content("/proc/thread-self/status").splitlines())
        self._status = {name: value.strip() for name, _, value in lines}

    def umask(self) -> int:
        """Its umask, which is that of the process."""
        if "Umask" in self._status:
            return int(self._status["Umask"], 8)
        umask = os.umask(0o077)
        os.umask(umask)
        return umask

    def inherited(self) -> object:
        """All that a program inherits and that cannot be sent with an order."""
        names = [name for name in self._status if name in _INHERITED or name.startswith("Cap")]
        return (
            sys.executable,
            [self._status[name] for name in names],
            _namespaces(),
            _content("/proc/thread-self/cgroup"),
            _content("/proc/self/oom_score_adj"),
            _content("/proc/self/personality"),
            _root(),
            os.getpriority(os.PRIO_PROCESS, 0),
            os.sched_getscheduler(0),
            [resource.getrlimit(each)[1] for each in _LIMITS],
        )


def serve(drivers: Sequence[Driver]) -> None:
    """Have the host of this process serve these together.

    Start another host where there is none, or where the present one inherited other things. Start a host for these servers
    alone if their start might keep other servers waiting.

    Raises as `Host` and `Host.serve`.
    """
    global _current  # noqa: PLW0603  # there is one at a time
    with lock:
        caller = _Caller()
        inherited = caller.inherited()
        for each in [each for each in _hosts if each.has_ended()]:
            _hosts.discard(each)
        if any(driver.may_block() for driver in drivers):
            own = Host(inherited, may_block=True)
            try:
                own.serve(drivers, caller)
            finally:
                own.retire()
            return
        host = _current
        if host is None or host.inherited != inherited or not host.is_usable():
            _current = Host(inherited)
            if host is not None:
                host.retire()
        assert _current is not None  # noqa: S101  # it was made here
        _current.serve(drivers, caller)


def current() -> Host | None:
    """The host that would get the next server, if it is usable then."""
    return _current


def _start(theirs: socket.socket) -> subprocess.Popen[bytes]:
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # Entries of other kinds are left out: Python ignores them, too.
    places = [os.path.abspath(place) for place in sys.path if place and isinstance(place, str) and "\0" not in place]
    passed: list[int] = []
    try:
        # Where the caller has closed its standard streams, the socket can have one of their numbers, which Popen replaces.
        passed.append(fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD))
        pidfd = _own_pidfd()
        if pidfd is not None:
            passed.append(pidfd)
        program = _PROGRAM.format(home, places, passed[0], pidfd)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=passed,
            start_new_session=True,
        )
    finally:
        _close(passed)


def _own_pidfd() -> int | None:
    """A pidfd of this process; None where the system has none, and the end of the socket has to do."""
    try:
        fd = os.pidfd_open(os.getpid())
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE):
            raise
        return None
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
    finally:
        os.close(fd)


def _file_with(content: bytes) -> int:
    fd = os.memfd_create("portexec", os.MFD_CLOEXEC)
    try:
        while content:
            content = content[os.write(fd, content) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_directory(path: str | None) -> int:
    """The directory for a command. Raises UsageError where `path` cannot be entered, OSError where the caller's own cannot."""
    try:
        fd = os.open(path or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.stat(".", dir_fd=fd)  # to enter a directory takes the right to search it
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        if path is None or error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        hint = "cwd has to be a directory that exists and may be entered"
        raise UsageError(f"cannot run in {path}: {reason(error)}", hint) from error
    return fd


def _limits() -> dict[int, int]:
    return {number: resource.getrlimit(number)[0] for number in _LIMITS}


def _namespaces() -> list[str]:
    try:
        return [os.readlink(f"/proc/thread-self/ns/{name}") for name in sorted(os.listdir("/proc/thread-self/ns"))]
    except OSError:
        return []


def _root() -> tuple[int, int]:
    status = os.stat("/")
    return status.st_dev, status.st_ino


def _content(path: str) -> str:
    try:
        return content(path).decode(errors="surrogateescape")
    except OSError:
        return ""


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _read_output(fd: int, readers: dict[int, Driver], poll: select.poll) -> None:
    """Read a piece of the output of a command. At the end, stop looking for more."""
    if not readers[fd].take_output():
        poll.unregister(fd)
        readers.pop(fd).close_output()


_current: Host | None = None
_hosts: set[Host] = set()  # those that we have not waited for


def _begin_as_child() -> None:
    global _current  # noqa: PLW0603  # see `serve`
    lock.release()
    _current = None
    for host in _hosts:
        host.forget()
    _hosts.clear()


def _end() -> None:
    """This process ends, which its hosts see. Python must not warn that they still run."""
    for host in _hosts:
        host.retire()
        if host.process.poll() is None:
            host.process.returncode = 0


os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=_begin_as_child)
atexit.register(_end)
