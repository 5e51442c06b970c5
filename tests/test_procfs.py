"""Who is below whom: a look at one tree finds what a look at all processes finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from portexec import procfs
from tests.support import wait_for

# Two levels, one of them from a thread that is not the main one, a dead child and a stopped one.
TREE = """
import os, signal, subprocess, threading
def fork():
    subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000 & wait"])
    threading.Event().wait()
threading.Thread(target=fork).start()
dead, stopped = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "1000"])
stopped.send_signal(signal.SIGSTOP)
print("started", flush=True)
"""


def is_whole(look: procfs.Processes, root: int) -> bool:
    """Whether all processes of the tree are there, in one look: one that is about to die would count in place of another."""
    return (len(look.below(root)), len(look.dead), len(look.stopped)) == (4, 1, 1)


def test_a_look_at_a_tree_finds_what_a_look_at_all_finds() -> None:
    with subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            root = process.pid
            wait_for(lambda: is_whole(procfs.Processes(root), root))
            every, tree = procfs.Processes(), procfs.Processes(root)
            assert procfs._listed_below(root) == every.below(root) | tree.dead
            assert tree.below(root) == every.below(root)
            assert (len(tree.dead), len(tree.stopped)) == (1, 1)
            assert tree.dead <= every.dead
            spared = next(iter(every.children[root]))
            assert tree.below(root, {spared}) == every.below(root, {spared})
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert procfs._listed_below(process.pid) is None
    assert procfs.descendants(process.pid) == set()
