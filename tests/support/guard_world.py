"""A command below portexec, the same one bare, and probers of two users: what a sequence of steps with sockets is tried on.

Each sequence has a number of its own, so that none is about what the one before has left. One portexec and one bare process,
in a network namespace, serve many sequences.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from portexec.binding.guard import overlap

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


class Cast:
    """Who plays: the user of portexec, that of the command, and how the command gets past the guard.

    `beside` is the user of the second prober, who is the command's.
    """

    def __init__(self, name: str, user: int, command: int, hand_off: str = "guard") -> None:
        self.name = name
        self.user = user
        self.command = command
        self.hand_off = hand_off

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
        Cast("root", 0, 0),
        Cast("user", DROPPED, DROPPED),
        Cast("dropped", 0, DROPPED),
        Cast("fd", DROPPED, DROPPED, "fd"),
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
        self.process.stdin.write(
            json.dumps(message[0] if len(message) == 1 and isinstance(message[0], int) else message) + "\n"
        )
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"{self.process.args!r} has ended: {self.process.wait(10)}")
        return json.loads(line)

    def close(self) -> None:
        """End its input, which ends it, and wait."""
        self.process.communicate(timeout=30)


class Stage:
    """Everything that is running for one cast."""

    def __init__(self, cast: Cast, stack: ExitStack, home: str, *, sequences: int, with_mptcp: bool) -> None:
        self.cast = cast
        self.begun = [0] * KINDS
        self.attempts = 0
        python = python_for(cast.user, home)
        puppet = [python, f"{home}/tests/children/puppet.py"]
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
        portexec = [python, "-m", "portexec", "-q", "-H", cast.hand_off, *listen, "--"]
        self.guarded = start([*portexec, *puppet, *become, *inherited, ports], **as_user(cast.user))
        self.ports = self.guarded.hear()
        self.bare: Actor | None = None
        if cast.is_compared:
            numbers = ",".join(str(FIRST_BARE + n) for n in range(sequences))
            self.bare = start([*puppet, "--own-network", *(["--as", str(cast.command)] if cast.command else []), numbers])
            self.bare.hear()
        prober = [sys.executable, f"{home}/tests/children/prober.py"]
        users = {"stranger": STRANGER, "same": cast.command}
        if cast.hand_off == "hold":
            del users["same"]  # it may share what shares by itself, as without us
        self.probers = {who: start([*prober, str(user), cast.allowed, *more]) for who, user in users.items()}

    def begin(self, kind: int) -> int:
        """Begin a sequence on a number of this kind, and return it. When all were used, they are used once more."""
        position = (KINDS * self.begun[kind] + kind) % len(self.ports)
        self.begun[kind] += 1
        port: int = self.ports[position]
        self.both("begin", position)
        return port

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
            self.attempts += tried
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
            self.restart()
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

    def restart(self) -> None:
        """Another process follows, with none of the sockets."""
        self.families = {name: family for name, family in self.families.items() if name == 0}
        self.handed_on.clear()
        self.connections.clear()
        self.can_drop = self.stage.cast.command == 0
        self.do("restart")

    def do(self, *step: Any) -> Any:
        """Make a step, probe, and note what is not as it should be. Returns what came of it below portexec."""
        guarded, bare = self.stage.both(*step)
        self.steps.append([*step, guarded])
        if guarded != bare and not self.explained:
            self.explained = self.explain(step, guarded, bare)
            if not self.explained:
                self.note("bare", f"bare: {bare}")
        self.remember(step, guarded)
        for who, got in self.stage.probe(self.port).items():
            self.note(who, f"got: {got[:6]}")
        return guarded

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
    """A copy of portexec and of the tests' programs that every user can read."""
    home = tempfile.mkdtemp(prefix="guard-", dir="/tmp")
    try:
        for part in ("portexec", "tests/children"):
            shutil.copytree(ROOT / part, Path(home, part), ignore=shutil.ignore_patterns("__pycache__"))
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


def python_for(user: int, home: str) -> str:
    """A Python that this user can run, and that can import portexec."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run([python, "-c", "import portexec.cli"], cwd=home, capture_output=True, **as_user(user))
        except OSError:
            continue
        if done.returncode == 0:
            return python
    raise RuntimeError(f"no Python that user {user} can run")
