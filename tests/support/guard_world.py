"""A command below portexec, the same one bare, and probers of two users: what a sequence of steps with sockets is tried on.

Each sequence has a number of its own, so that none is about what the one before has left. One portexec and one bare process,
in a network namespace, serve many sequences.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from portexec.binding.guard import overlap
from tests.support.proc import is_gone, is_polling, status_of
from tests.support.waiting import DEADLINE, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
STRANGER = 65534
DROPPED = 1000
FIRST_BARE = 20000  # numbers in a namespace of their own
SEQUENCES = 150  # numbers of one portexec
EVERY_OPTION = "-,a,p,ap"
WITHOUT_REUSEADDR = "-,p"
HOSTS = {
    "4": ["127.0.0.1", "127.0.0.2", "0.0.0.0"],
    "6": ["::1", "::"],
    "46": ["::1", "::", "::ffff:127.0.0.1"],
}
MANY = 6  # sockets at a time
SERVED = ["127.0.0.1", "127.0.0.2", "::1"]
FD_LISTENERS = ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0", "*:0"]
KINDS = len(FD_LISTENERS)
LATE = 2.0  # seconds in which the kernel gives back the number of a socket of MPTCP that was closed


# How a process follows another one: the command starts it itself; portexec is asked to restart the command; the command fails
# and portexec restarts it; HUP has portexec replace it.
RELOADED, ASKED, FAILED, REPLACED = "reloaded", "asked", "failed", "replaced"


class Cast:
    """Who plays: the user of portexec, that of the command, and how the command gets past the guard.

    `ways` are those in which another process of the command can follow on the same number.
    """

    def __init__(self, name: str, user: int, command: int, hand_off: str = "guard", *, ways: tuple[str, ...] = ()) -> None:
        self.name = name
        self.user = user
        self.command = command
        self.hand_off = hand_off
        self.ways = (RELOADED, *ways)

    @property
    def allowed(self) -> str:
        """The options of strangers. With `hold`, whoever names the number and sets SO_REUSEADDR passes, which is said."""
        return WITHOUT_REUSEADDR if self.hand_off == "hold" else EVERY_OPTION

    @property
    def is_compared(self) -> bool:
        return self.hand_off == "guard"


CASTS = {
    cast.name: cast
    for cast in (
        Cast("root", 0, 0, ways=(ASKED, FAILED)),
        Cast("user", DROPPED, DROPPED, ways=(ASKED, FAILED)),
        Cast("dropped", 0, DROPPED, ways=(ASKED, FAILED)),
        Cast("fd", DROPPED, DROPPED, "fd"),
        Cast("kept fd", DROPPED, DROPPED, "fd", ways=(ASKED, FAILED, REPLACED)),
        Cast("hold", DROPPED, DROPPED, "hold"),
    )
}


class Actor:
    """A process that answers each line with one."""

    def __init__(self, words: list[str], **options: Any) -> None:
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)

    def ask(self, *message: Any) -> Any:
        """Say a line, and the answer."""
        self.say(*message)
        return self.hear()

    def say(self, *message: Any) -> None:
        assert self.process.stdin is not None
        text = json.dumps(message[0] if len(message) == 1 and isinstance(message[0], int) else message)
        try:
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(f"{self.process.args!r} has ended: {self.process.wait(10)}") from None

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"{self.process.args!r} has ended: {self.process.wait(10)}")
        return json.loads(line)

    def close(self) -> None:
        """End its input, which ends it, and wait."""
        self.process.communicate(timeout=30)


class Control:
    """The control descriptor of a portexec; `theirs` is its end."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(DEADLINE)
        self.events = self.ours.makefile("r")

    def started(self, *, asked_for: bool = False) -> int:
        """The pid of the next start of the command that was asked for, or was not."""
        return int(self.wait_for("started", asked_for=asked_for)["pid"])

    def wait_for(self, name: str, **fields: Any) -> Any:
        """The next event of this name with these fields. An error is the end of portexec."""
        while True:
            event = json.loads(self.events.readline())
            if {"event": name, **fields}.items() <= event.items():
                return event
            assert event["event"] != "error", event

    def ask(self, what: str) -> None:
        """Ask portexec to do something."""
        self.ours.sendall(json.dumps({"do": what}).encode() + b"\n")

    def close(self) -> None:
        """Close both ends."""
        self.events.close()
        self.ours.close()
        self.theirs.close()


class Stage:
    """Everything that is running for one cast."""

    def __init__(self, cast: Cast, stack: ExitStack, home: str, *, sequences: int, with_mptcp: bool) -> None:
        self.cast = cast
        self.begun = [0] * KINDS
        self.attempts: Counter[str] = Counter()  # by who tried
        python = python_for(cast.user, home)
        puppet = [python, "-S", f"{home}/tests/children/puppet.py"]
        become = ["--as", str(cast.command)] if cast.command != cast.user else []
        environment = {**os.environ, "PYTHONPATH": home, "PYTHONDONTWRITEBYTECODE": "1"}
        more = ["mptcp"] if with_mptcp else []

        def start(words: list[str], **options: Any) -> Actor:
            actor = Actor(words, env=environment, cwd=home, **options)
            stack.callback(actor.close)
            return actor

        specs = FD_LISTENERS if cast.hand_off == "fd" else ["127.0.0.1:0"] * KINDS
        listen = [word for n in range(sequences) for word in ("-l", f"n{n}={specs[n % KINDS]}")]
        ports = ",".join(f"{{n{n}.port}}" for n in range(sequences))
        inherited = ["--inherited", "{n0.fd}"] if cast.hand_off == "fd" else []
        portexec = [python, "-m", "portexec", "-q", "-H", cast.hand_off, *listen]
        options = as_user(cast.user)
        self.control: Control | None = None
        if len(cast.ways) > 1:
            self.control = Control()
            portexec += ["--restart", "always", "--ready", "none", "--control-fd", str(self.control.theirs.fileno())]
            options["pass_fds"] = [self.control.theirs.fileno()]
        self.guarded = start([*portexec, "--", *puppet, *become, *inherited, ports], **options)
        if self.control is not None:
            stack.callback(self.control.close)  # which ends the run, so that the command's end is not followed by a restart
        self.command, self.ports = self.guarded.hear()
        if self.control is not None:
            assert self.control.started() == self.command
        self.position = 0
        self.bare: Actor | None = None
        if cast.is_compared:
            numbers = ",".join(str(FIRST_BARE + n) for n in range(sequences))
            self.bare = start([*puppet, "--own-network", *(["--as", str(cast.command)] if cast.command else []), numbers])
            self.bare.hear()
        prober = [sys.executable, "-S", f"{home}/tests/children/prober.py"]
        users = {"stranger": STRANGER, "same": cast.command}
        if cast.hand_off == "hold":
            del users["same"]  # it may share what shares by itself, as without us
        self.probers = {who: start([*prober, str(user), cast.allowed, *more]) for who, user in users.items()}

    def begin(self, kind: int) -> int:
        """Begin a sequence on a number of this kind, and return it. When all were used, they are used once more."""
        position = (KINDS * self.begun[kind] + kind) % len(self.ports)
        self.begun[kind] += 1
        self.position = position
        port: int = self.ports[position]
        self.both("begin", position)
        return port

    def follow(self, way: str = RELOADED) -> None:
        """Have another process follow on the same number, bare and below portexec."""
        if way == RELOADED:
            self.both("restart")
            return
        if self.bare is not None:
            self.bare.ask("restart")
        assert self.control is not None
        old = self.command
        shim = int(status_of(old)["PPid"])
        if way == FAILED:
            self.guarded.say("fail")
            self.control.wait_for("ended")
        elif way == REPLACED:
            self.guarded.ask("end")
            self.guarded.process.send_signal(signal.SIGHUP)
        if way != REPLACED:
            self.control.ask("restart")
        self.command = self.control.started(asked_for=way != REPLACED)
        while self.guarded.hear() != [self.command, self.ports]:
            pass  # a command that had failed was started before portexec was asked to, and then once more
        if way == REPLACED:
            self.control.wait_for("ended")  # no later way is to take it for the end of its own command
            # When the old one has ended, a listener that was shut down listens again. The same user may pass meanwhile.
            wait_for(lambda: is_gone(shim) and is_polling(self.guarded.process.pid))
        assert is_gone(old)  # both read what is said
        self.guarded.ask("begin", self.position)

    def both(self, *step: Any) -> tuple[Any, Any]:
        """Make a step, also in the bare process; what came of both, twice the same where nothing is compared."""
        self.guarded.say(*step)
        if self.bare is not None:
            self.bare.say(*step)
        guarded = self.guarded.hear()
        return guarded, self.bare.hear() if self.bare is not None else guarded

    def probe(self, port: int) -> dict[str, Any]:
        """What each prober gets of the number now, one after the other."""
        found = {}
        for name, prober in self.probers.items():
            tried, got = prober.ask(port)
            self.attempts[name] += tried
            if got:
                found[name] = got
        return found


class Bound(NamedTuple):
    """A socket that is bound to the number; the address is `*` for both families."""

    host: str
    reuse_address: int
    reuse_port: int
    is_listening: int


class Sequence:
    """One sequence of steps on one number, with the two processes' sockets, and what was found.

    A finding is a kind, `stranger`, `same` or `bare`, and a text with all steps up to it. `explained` says what differs
    for a reason that is known, after which the two are compared no more.
    """

    def __init__(self, stage: Stage, kind: int) -> None:
        """Begin it, with hand-off `fd` on a listener of this kind."""
        self.stage = stage
        self.port = stage.begin(kind)
        self.steps: list[Any] = []
        self.findings: list[tuple[str, str]] = []
        self.families: dict[int, str] = {}  # of the sockets that are open
        self.handed_on: set[int] = set()
        self.connections: dict[int, list[int]] = {}  # and the ends that are open
        self.count = 0
        self.explained = ""
        self.options: dict[int, tuple[int, int]] = {}  # SO_REUSEADDR and SO_REUSEPORT of each socket
        self.bound: dict[int, Bound] = {}
        self.has_served_shared = False  # there may be connections that are left of a socket with SO_REUSEPORT
        self.has_served_dropped = False  # there may be connections of which the user is not that of the sockets
        self.multipath: set[int] = set()  # the sockets of MPTCP, closed ones too
        self.can_drop = stage.cast.command == 0
        if stage.cast.hand_off == "fd":
            self.options[0] = (1, 0)
            self.families[0] = "6" if "[" in FD_LISTENERS[kind] else "4"

    def step(self, chance: Any) -> None:
        """Make a step that is possible now. `chance` is a random.Random or what behaves like it."""
        mine = [name for name in self.families if name not in self.handed_on]
        possible = ["make"] * (3 if len(self.families) < MANY else 0)
        possible += ["bind"] * 4 + ["listen"] * 4 + ["shut", "hand_on"] if mine else []
        possible += ["meet"] * 3 + ["close"] * 2 + ["restart"] if self.families else []
        possible += ["part"] * 3 if self.connections else []
        possible += ["drop"] if self.can_drop else []
        word = chance.choice(possible)
        if word == "make":
            options = [chance.choice(["4", "6", "46", "46"]), *(chance.choice([0, 1]) for _ in range(2))]
            self.make(*options, is_mptcp=chance.choice([0, 0, 0, 1]))
        elif word == "bind":
            name = chance.choice(mine)
            self.do("bind", name, chance.choice(HOSTS[self.families[name]]))
        elif word == "meet":
            self.meet(chance.choice(SERVED))
        elif word == "close":
            self.close(chance.choice(list(self.families)))
        elif word == "part":
            name = chance.choice(list(self.connections))
            self.part(name, chance.choice(self.connections[name]))
        elif word == "restart":
            self.restart(chance.choice([RELOADED] * 3 + [*self.stage.cast.ways]))
        elif word == "drop":
            self.drop()
        else:
            name = chance.choice(mine)
            if word == "hand_on":
                self.hand_on(name)
            else:
                self.do(word, name)

    def make(self, family: str, reuse_address: int, reuse_port: int, *, is_mptcp: int) -> None:
        self.count += 1
        self.families[self.count] = family
        if is_mptcp:
            self.multipath.add(self.count)
        self.do("make", self.count, family, reuse_address, reuse_port, is_mptcp)

    def meet(self, host: str) -> None:
        self.count += 1
        if self.do("meet", self.count, host) == "ok":
            self.connections[self.count] = [0, 1]

    def part(self, name: int, side: int) -> None:
        self.connections[name].remove(side)
        if not self.connections[name]:
            del self.connections[name]
        self.do("part", name, side)

    def close(self, name: int) -> None:
        del self.families[name]
        self.handed_on.discard(name)
        self.bound.pop(name, None)
        self.do("close", name)

    def hand_on(self, name: int) -> None:
        self.handed_on.add(name)
        self.do("hand_on", name)

    def drop(self) -> None:
        self.can_drop = False
        self.do("drop", DROPPED)

    def restart(self, way: str = RELOADED) -> None:
        """Another process follows, with none of the sockets."""
        self.families = {name: family for name, family in self.families.items() if name == 0}
        self.handed_on.clear()
        self.connections.clear()
        self.can_drop = self.stage.cast.command == 0
        self.do("restart", way)

    def do(self, *step: Any) -> Any:
        """Make a step, probe, and note what is not as it should be. Returns what came of it below portexec."""
        if step[0] == "restart":
            self.stage.follow(*step[1:])
            guarded = bare = "ok"
        else:
            guarded, bare = self.stage.both(*step)
        if guarded != bare and self.multipath - self.families.keys():  # the kernel closes a socket of MPTCP a moment later
            guarded, bare = self.insist(step, guarded, bare)
        self.steps.append([*step, guarded])
        if guarded != bare and not self.explained:
            self.explained = self.explain(step, guarded, bare)
            if not self.explained:
                self.note("bare", f"bare: {bare}")
        self.remember(step, guarded)
        for who, got in self.stage.probe(self.port).items():
            self.note(who, f"got: {got[:6]}")
        return guarded

    def insist(self, step: Any, guarded: Any, bare: Any) -> tuple[Any, Any]:
        """Have the one that was refused a number try again, while the kernel may not have given it back yet."""
        assert self.stage.bare is not None
        end = time.monotonic() + LATE
        while guarded != bare and "EADDRINUSE" in (guarded[0], bare[0]) and time.monotonic() < end:
            if guarded[0] == "EADDRINUSE":
                guarded = self.stage.guarded.ask(*step)
            else:
                bare = self.stage.bare.ask(*step)
        return guarded, bare

    def remember(self, step: Any, outcome: Any) -> None:
        if step[0] == "make":
            self.families[step[1]] = step[2]
            self.options[step[1]] = (step[3], step[4])
        elif step[0] in ("bind", "listen") and outcome[0] == "ok" and outcome[2]:
            host = "*" if self.families[step[1]] == "46" and outcome[1] == "::" else outcome[1].removeprefix("::ffff:")
            self.bound[step[1]] = Bound(host, *outcome[3:])
        elif step[0] == "shut" and step[1] in self.bound:
            self.bound[step[1]] = self.bound[step[1]]._replace(is_listening=0)
        elif step[0] == "meet" and outcome == "ok":
            self.has_served_shared = self.has_served_shared or any(one.reuse_port for one in self.bound.values())
            self.has_served_dropped = self.has_served_dropped or not self.can_drop
        elif step[0] == "restart":
            self.bound.clear()

    def explain(self, step: Any, guarded: Any, bare: Any) -> str:
        """Why the two differ, if it is one of the differences that are known and told."""
        if step[0] not in ("bind", "listen"):
            return ""
        reuse_address, reuse_port = self.options[step[1]]
        if guarded[0] == "ok" and bare[0] == "EADDRINUSE" and self.has_served_shared and not reuse_port:
            return "beside connections that are left of a socket with SO_REUSEPORT"
        if guarded[0] == "EADDRINUSE" and bare[0] == "ok" and reuse_port:
            if self.has_served_dropped and not reuse_address:
                return "beside connections that were accepted by another user than the socket's"
            host = step[2] if step[0] == "bind" else bare[1]
            host = "*" if self.families[step[1]] == "46" and host == "::" else host.removeprefix("::ffff:")
            others = [one for name, one in self.bound.items() if name != step[1] and overlap(host, one.host)]
            if any(not one.reuse_port and (one.is_listening or not (reuse_address and one.reuse_address)) for one in others):
                return "the kernel did not check, as what it had cached matched"
        return ""

    def note(self, kind: str, what: str) -> None:
        self.findings.append((kind, f"{what} after {json.dumps(self.steps)}"))

    def end(self) -> None:
        """End it."""
        self.stage.both("end")


@contextmanager
def house() -> Iterator[str]:
    """A copy of portexec and of the tests' programs that every user can read, with what Python has compiled of them.

    A user who cannot write there would compile all of it anew at each start.
    """
    home = tempfile.mkdtemp(prefix="guard-", dir="/tmp")
    try:
        for part in ("portexec", "tests/children"):
            shutil.copytree(ROOT / part, Path(home, part), ignore=shutil.ignore_patterns("*.pyc.*"))  # what is just written
        subprocess.run(["chmod", "-R", "a+rX", home], check=True)
        yield home
    finally:
        shutil.rmtree(home)


@contextmanager
def staged(cast: Cast, home: str, *, sequences: int = SEQUENCES, with_mptcp: bool = False) -> Iterator[Stage]:
    """Start everything for a cast, and end it."""
    with ExitStack() as stack:
        yield Stage(cast, stack, home, sequences=sequences, with_mptcp=with_mptcp)


def as_user(user: int) -> dict[str, Any]:
    """The options of Popen that start a process as this user."""
    return {"user": user, "group": user, "extra_groups": []} if user != os.geteuid() else {}


@cache
def python_for(user: int, home: str) -> str:
    """A Python that this user can run, and that can import portexec. It finds all of the house compiled."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run([python, "-c", "import portexec.cli"], cwd=home, capture_output=True, **as_user(user))
        except OSError:
            continue
        if done.returncode == 0:
            subprocess.run([python, "-m", "compileall", "-q", "."], cwd=home, check=True)
            return python
    raise RuntimeError(f"no Python that user {user} can run")
