"""What a server wrote, and how its death is told when nobody waits for it."""

from __future__ import annotations

import os
import signal
import sys

import portexec
from portexec.api import output
from portexec.api.known_servers import Watched
from portexec.binding.tables import listening_inodes
from portexec.procfs import is_any_ending
from tests.support import DEADLINE, wait_for
from tests.support.proc import state, words_of
from tests.support.serving import (
    LIGHT,
    ask,
    greeting,
    hook,
    tell,
)


def test_the_output_is_bounded_and_never_in_the_way() -> None:
    with portexec.serve(LIGHT) as server:
        assert ask(server, "write/1000000") == greeting(server)
        assert server.output.endswith("written\n"), "what was written before the answer is there with it"
        assert len(server.output.encode()) == output.LIMIT
        assert server.output == (("x" * 99 + "\n") * 700 + "written\n")[-output.LIMIT :]
    assert server.output.endswith("written\n")


def test_a_death_that_nobody_waits_for_is_told_with_the_last_words() -> None:
    with portexec.serve(LIGHT) as server:
        assert server.died() is None
        tell(server, "burst/1000000")
        death = server.died(patience=DEADLINE)
        assert death is not None
        assert (death.returncode, death.output) == (7, server.output)
        assert "exit status 7" in death.message
        assert death.output.splitlines()[-1] == "written"


def test_a_death_just_before_the_stop_is_told_after_it() -> None:
    for _ in range(10):
        with portexec.serve(LIGHT) as server:
            os.kill(server.pid, signal.SIGKILL)
            wait_for(lambda pid=server.pid: not words_of(pid))  # type: ignore[misc]
        death = server.died()
        assert death is not None
        assert death.returncode == -signal.SIGKILL
    with portexec.serve(LIGHT) as server:
        pass
    assert server.died() is None


LEFT_BY_MAIN = """
import ctypes, signal, threading
threading.Thread(target=signal.pause).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_server_whose_main_thread_has_ended_is_alive() -> None:
    with portexec.serve([sys.executable, "-c", LEFT_BY_MAIN], ready="none") as server:
        wait_for(lambda: state(server.pid) == "Z")
        assert server.died() is None
    assert server.returncode == -signal.SIGTERM
    assert server.died() is None


DEAF = '"$@" & echo $!; wait; exec sleep 1000'


def test_a_look_tells_whether_a_death_may_come() -> None:
    """Nobody has to wait for a death that does not come."""
    with portexec.serve(["sh", "-c", DEAF, "sh", *LIGHT], ready="listen") as server:
        watched = Watched(server._driver, None)
        assert not watched.seems_to_be_dying()
        tell(server, "exit/3")
        wait_for(lambda: not listening_inodes(server.port) and not is_any_ending(server.pid))
        assert watched.seems_to_be_dying()
        assert watched.death() is None  # the shell goes on
        assert not watched.seems_to_be_dying()  # what was no sign once is none later
        server.restart()
        assert not watched.seems_to_be_dying()
        tell(server, "exit/3")
        wait_for(watched.seems_to_be_dying)
    with portexec.serve(["sleep", "1000"], ready="none") as server:
        assert not Watched(server._driver, None).seems_to_be_dying()


def test_a_server_that_was_stopped_by_somebody_else_has_died() -> None:
    with portexec.serve(LIGHT) as server:
        os.kill(hook(server), signal.SIGTERM)
        death = server.died(DEADLINE)
        assert death is not None
        assert death.returncode == -signal.SIGTERM
