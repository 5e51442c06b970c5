"""Whether a listen(2) is that of a server: a listener that is closed at once makes nobody ready.

A third of the popular dev servers listen on their number to see whether it is free, close, and serve seconds later: Vite,
Create React App, Docusaurus, Storybook, Parcel, and all that use detect-port, get-port or portfinder. Such a look closes its
listener at once. A server goes on to wait for its clients.

So a listener counts when it still listens while the thread that opened it sleeps:

- in a call that waits for clients, or for events (accept, poll, select, epoll, io_uring), once, if we know the machine's calls;
- in anything else, when two looks some time apart show the same sleep. A thread of Python, beside a busy one, waits for the
  interpreter's lock between the listen and the close of a look. It wakes every 5 ms to ask for the lock, so its sleeps differ.

Where the thread cannot be seen, or has ended, the listener counts when it still listens after a while. Where the thread never
rests, it counts after a longer while.

Where we did not see which thread opened a listener, as with hand-off `hold`, all threads of the processes that have it open
have to show the same sleep twice. Otherwise the listener counts when it still listens after a while.
"""

from __future__ import annotations

import os
import time

from portexec import kernel
from portexec.binding import tables
from portexec.parent.loop import Event, first, sleep, spawn
from portexec.procfs import content, status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

_FIRST_PAUSE = 0.0005  # seconds between two looks at a thread; each further one is a little longer
_LONGEST_PAUSE = 0.02
_LONGER = 1.3
_SAME_SLEEP = 0.02  # seconds between the two looks that have to show one sleep
_SETTLING = 0.25  # seconds for a listener whose thread cannot be seen
_LONG_ENOUGH = 1.0  # seconds for a listener whose thread never rests


class _Opened:
    """A listener that may be a server's. If its thread never rests, that is decided at the time `until`."""

    __slots__ = ("inode", "port", "serves", "until")

    def __init__(self, port: int, inode: int, serves: Callable[[], object]) -> None:
        self.port = port
        self.inode = inode
        self.serves = serves
        self.until = time.monotonic() + _LONG_ENOUGH


class _Thread:
    """A thread that opens listeners, and its listeners that are not decided. One look at the thread is for all of them."""

    __slots__ = ("id", "is_one_more", "opened")

    def __init__(self, id: int) -> None:
        self.id = id
        self.opened: dict[_Opened, None] = {}  # a dict for its order
        self.is_one_more = Event()

    def add(self, opened: _Opened) -> None:
        """The thread has opened one more listener, or is about to."""
        self.opened[opened] = None
        self.is_one_more.set()

    async def settle(self) -> None:
        """Look until all are decided. Each look comes after a pause: a bind that follows at once is not kept waiting."""
        pause = _FIRST_PAUSE
        due = time.monotonic() + pause
        while self.opened:
            if await first(self.is_one_more.wait(), within=due - time.monotonic()) == 0:
                self.is_one_more, pause = Event(), _FIRST_PAUSE
                due = min(due, time.monotonic() + pause)
            else:
                await self._look()
                pause = min(_LONGER * pause, _LONGEST_PAUSE)
                due = time.monotonic() + pause

    async def _look(self) -> None:
        opened = list(self.opened)
        call, sleeps = _look_at(self.id)
        if call == "running":
            now = time.monotonic()
            self._decide([one for one in opened if one.until < now])
        elif not call:
            await sleep(_SETTLING)
            self._decide(opened)
        elif int(call.split(" ", 1)[0]) in kernel.WAITS.get(os.uname().machine, ()):
            self._decide(opened)
        else:
            await sleep(_SAME_SLEEP)
            is_same = _look_at(self.id) == (call, sleeps)
            now = time.monotonic()
            self._decide([one for one in opened if is_same or one.until < now])

    def _decide(self, opened: Collection[_Opened]) -> None:
        """Decide these: each that still listens is a server's."""
        left = set(_left({one.inode: one.port for one in opened}))
        for one in opened:
            del self.opened[one]
            if one.inode in left:
                one.serves()


class Settling:
    """The threads that have opened listeners lately."""

    def __init__(self) -> None:
        self._threads: dict[int, _Thread] = {}

    def add(self, thread: int, port: int, inode: int, serves: Callable[[], object]) -> None:
        """The thread opens this listener. `serves` is called if the listener turns out to be a server's."""
        opened = _Opened(port, inode, serves)
        if thread in self._threads:
            self._threads[thread].add(opened)
        else:
            self._threads[thread] = _Thread(thread)
            self._threads[thread].add(opened)
            spawn(self._settle(thread))

    async def _settle(self, thread: int) -> None:
        try:
            await self._threads[thread].settle()
        finally:
            del self._threads[thread]  # also when the loop ends, as after a rehearsal: the thread goes on under another loop


async def staying(opened: Mapping[int, int]) -> set[int]:
    """Wait until it turns out which of these listeners are a server's. Returns the inodes of those.

    `opened` has the number of each listener by its inode. It is for listeners whose opening thread we do not know.
    """
    places = tables.descriptors_of(opened)
    processes = {pid for pid, _ in places.values()}
    end = time.monotonic() + _SETTLING
    before: list[list[tuple[str, str]]] = []
    while time.monotonic() < end and _left(opened):
        looks = [_look_at_all(process) for process in processes]
        if looks == before and len(places) == len(opened) and all(map(_is_asleep, looks)):
            break
        before = looks
        await sleep(_SAME_SLEEP)
    return set(_left(opened))


def _left(opened: Mapping[int, int]) -> list[int]:
    """The inodes of those that still listen. Where we cannot look any more, all that were opened count."""
    listening = {port: _listening(port) for port in set(opened.values())}
    return [inode for inode, port in opened.items() if (inodes := listening[port]) is None or inode in inodes]


def _listening(port: int) -> set[int] | None:
    """The listeners of a number; None where no descriptor is left to look with."""
    try:
        return tables.listening_inodes(port)
    except OSError:
        return None


def _look_at_all(process: int) -> list[tuple[str, str]]:
    """A look at each thread of a process; nothing where they cannot be seen."""
    try:
        threads = sorted(map(int, os.listdir(f"/proc/{process}/task")))
    except OSError:
        return []
    looks = [_look_at(thread) for thread in threads]
    return looks if all(call for call, _ in looks) else []


def _is_asleep(looks: Sequence[tuple[str, str]]) -> bool:
    """Whether all threads of a process were seen to sleep."""
    return bool(looks) and all(call != "running" for call, _ in looks)


def _look_at(thread: int) -> tuple[str, str]:
    """The call in which a thread sleeps, with its arguments, or `running`; and how often it has slept. Empty: not seen."""
    try:
        call = content(f"/proc/{thread}/syscall").decode()
        return call.strip(), status(thread, "voluntary_ctxt_switches")
    except OSError:
        return "", ""
