"""The job that portexec gives a shim, and what the two say to each other over their `link`, in which order.

    portexec says                the shim answers
    PREPARE                      PREPARED, REFUSED or UNABLE
    GO, also right behind it     STARTED or FAILED; then, any number of times, LISTENING and ADVISED
    SIGNAL, DRAIN, STOP, KILL    nothing at once
                                 ENDED, when the command has ended, and GONE, when nothing of it is left
    LEAVE, or QUIT               nothing: it ends

portexec may say UNDO and KEEP at any time. After GO the shim may say SIGNALLED at any time, and UNABLE as its last word. The
end of the link is news, too: the other process has ended, or portexec has given up the run.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from portexec.binding.guard import Guard
    from portexec.command.plan import Plan

# What portexec says.
PREPARE = b"p"  # fork the child that is to execute the command
GO = b"g"  # numbers of signals: execute the command, with these pending if it has them blocked
SIGNAL = b"n"  # number and sender: portexec was sent this signal
STOP = b"s"  # number and sender: stop the tree; portexec was sent this signal
DRAIN = b"a"  # tell the command to end, and give it as much time as it takes
KILL = b"k"  # stop the tree at once
UNDO = b"u"  # an entry of the undo list
KEEP = b"e"  # an entry that is no longer on the undo list
LEAVE = b"l"  # end; nothing runs, and nothing is to be undone
QUIT = b"q"  # end; nothing runs, and what the run has made is to be undone

# What the shim says.
PREPARED = b"d"  # why binds have to be gated, or empty: the child waits for the word to go
REFUSED = b"r"  # why: this machine does not let us admit binds
UNABLE = b"x"  # errno and reason: no child could be started, or the shim cannot go on, and has ended
STARTED = b"b"  # the command's pid
FAILED = b"f"  # status, message, hint: the command cannot be executed
LISTENING = b"i"  # port and address
ADVISED = b"h"  # a topic of `Job.advised`: people were told what may help
SIGNALLED = b"w"  # number: the shim alone was sent this signal
ENDED = b"e"  # wait status of the command; whether it had been told to end; whether something is left that may serve
GONE = b"o"  # nothing of the command is left; it waits for LEAVE

KILLED_EARLY = "the process that was to start it was killed"  # in words: the link has ended before STARTED

ALONE = -1  # in place of a sender: it is known that the signal was sent to one process alone


class Job:
    """What a shim is to run, and how. Times are in seconds.

    `guards` is empty where no binds are admitted. `patience` is how long a tree that was told to stop may take before KILL.
    If it is None, the command has no limit, and the rest of the tree has `kill_after` after the command's end.
    `leaves_daemons`: processes that a command leaves behind when it ends by itself go on. `kept` are descriptors of
    portexec that stay open until nothing is left of the command: their end tells that to other processes. `names_port`:
    words or variables of the command have a number of ours. `is_rehearsed`: an earlier start has shown that the binds can
    be admitted. `advised` are the topics on which any start of the run has given people advice. `is_apart`: the command
    gets a session of its own. `limits` are its soft limits, by their numbers in setrlimit(2). `tell_end` is called when
    nothing is left and portexec, which would tell of that, has died.
    """

    __slots__ = (
        "advised",
        "guards",
        "is_apart",
        "is_rehearsed",
        "kept",
        "kill_after",
        "leaves_daemons",
        "limits",
        "names_port",
        "patience",
        "plan",
        "quiet",
        "remap",
        "tell_end",
        "verbose",
    )

    def __init__(
        self,
        plan: Plan,
        *,
        kill_after: float,
        patience: float | None,
        guards: Mapping[int, Guard],
        remap: Mapping[int, int],
        leaves_daemons: bool,
        kept: set[int],
        names_port: bool,
        advised: set[str],
        quiet: bool,
        verbose: bool,
        is_apart: bool = False,
        is_rehearsed: bool = False,
        limits: Mapping[int, int] | None = None,
        tell_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan = plan
        self.kill_after = kill_after
        self.patience = patience
        self.guards = guards
        self.remap = remap
        self.leaves_daemons = leaves_daemons
        self.kept = kept
        self.names_port = names_port
        self.advised = advised
        self.quiet = quiet
        self.verbose = verbose
        self.is_apart = is_apart
        self.is_rehearsed = is_rehearsed
        self.limits = limits or {}
        self.tell_end = tell_end

    def limit(self) -> None:
        """Set the limits, for this process and all below it. Raises OSError."""
        if self.limits:
            import resource

            for number, soft in self.limits.items():
                before, hard = resource.getrlimit(number)
                if before != soft:
                    resource.setrlimit(number, (soft, hard))

    def guard_descriptors(self) -> set[int]:
        """The descriptors of the guards that binds are admitted past."""
        return {guard.fileno() for guard in self.guards.values()}
