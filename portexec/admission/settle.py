"""Whether a listen(2) is that of a server: readiness is a state, and a listen is only news.

A third of the popular dev servers listen on their number to look whether it is free, close, and serve seconds later: Vite,
Create React App, Docusaurus, Storybook, Parcel, and whatever uses detect-port, get-port or portfinder. A look closes in the
same breath. A server goes to wait for its clients.

So a listener counts when it listens still while the thread that opened it sleeps:

- in a call that waits for clients, or for events (accept, poll, select, epoll, io_uring), once;
- in anything else, when two looks some time apart show the same sleep. A look by a thread of Python, beside a busy one, sleeps
  for the interpreter's lock between its listen and its close, but wakes every 5 ms to ask for it.

Where a thread cannot be seen, or has ended, the listener counts when it still listens after a while.
"""

from __future__ import annotations

import os

from portexec.binding import tables
from portexec.parent.loop import sleep

# The system calls that wait for clients, by machine. Elsewhere only the second rule is left.
_WAITS = {
    # poll, select, accept, epoll_wait, pselect6, ppoll, epoll_pwait, accept4, io_uring_enter, epoll_pwait2
    "x86_64": {7, 23, 43, 232, 270, 271, 281, 288, 426, 441},
    # epoll_pwait, pselect6, ppoll, accept, accept4, io_uring_enter, epoll_pwait2
    "aarch64": {22, 72, 73, 202, 242, 426, 441},
}
_FIRST_PAUSE = 0.0005  # seconds between two looks at a thread; each further one is a little longer
_LONGEST_PAUSE = 0.02
_LONGER = 1.3
_SAME_SLEEP = 0.02  # seconds between the two looks that have to show one sleep
_SETTLING = 0.25  # seconds for a listener whose thread cannot be seen


async def is_served(thread: int, port: int, inode: int) -> bool:
    """Wait until this listener, which the thread has just opened, turns out to be a server's; False if it was a look."""
    waits = _WAITS.get(os.uname().machine, set())
    pause = _FIRST_PAUSE
    while True:
        call, sleeps = _look_at(thread)
        if not call:
            await sleep(_SETTLING)
            return _listens(port, inode)
        if call != "running":
            is_waiting = int(call.split(" ", 1)[0]) in waits
            if not is_waiting:
                await sleep(_SAME_SLEEP)
            if not _listens(port, inode):
                return False
            if is_waiting or _look_at(thread) == (call, sleeps):
                return True
        elif pause >= _LONGEST_PAUSE and not _listens(port, inode):
            return False
        await sleep(pause)
        pause = min(_LONGER * pause, _LONGEST_PAUSE)


def _listens(port: int, inode: int) -> bool:
    return inode in tables.listening_inodes(port)


def _look_at(thread: int) -> tuple[str, str]:
    """The call in which a thread sleeps, with its arguments, or `running`; and how often it has slept. Empty: not seen."""
    try:
        with open(f"/proc/{thread}/syscall") as file:
            call = file.read().strip()
        with open(f"/proc/{thread}/status") as file:
            _, _, rest = file.read().partition("\nvoluntary_ctxt_switches:")
    except OSError:
        return "", ""
    return call, rest.split("\n", 1)[0].strip()
