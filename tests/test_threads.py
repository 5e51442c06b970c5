"""The descriptors of other threads that we duplicate, for which a pidfd is kept."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from portexec.admission.own import Own
from portexec.admission.seccomp import Threads

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
TRIES = 300  # other processes begin meanwhile, and one may get the process id and keep it: then another id is tried
TRIES_OF_ONE = 5


@contextmanager
def holding(passed: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has a descriptor of ours open, and waits."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[passed]) as process:
        try:
            yield process
        finally:
            process.kill()


def inode_by(threads: Threads, pid: int, fd: int) -> int:
    duplicate = threads.duplicate(pid, fd)
    try:
        return os.fstat(duplicate).st_ino
    finally:
        os.close(duplicate)


def fork_as(pid: int) -> bool:
    """Fork a child with this process id, which waits for a signal; False if another process was faster."""
    LAST_PID.write_text(str(pid - 1))
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    if child != pid:
        end(child)
    return child == pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_of_several_processes_each_gives_its_own_and_nothing_is_left() -> None:
    threads = Threads()
    before = os.listdir("/proc/self/fd")
    with socket.socket() as one, holding(one.fileno()) as first, socket.socket() as other, holding(other.fileno()) as second:
        inodes = {first.pid: os.fstat(one.fileno()).st_ino, second.pid: os.fstat(other.fileno()).st_ino}
        fds = {first.pid: one.fileno(), second.pid: other.fileno()}
        for pid in (first.pid, second.pid, second.pid, first.pid):
            assert inode_by(threads, pid, fds[pid]) == inodes[pid]
            assert len(threads.descriptors()) <= 1
        first.kill()
        first.wait()
        with pytest.raises((ProcessLookupError, FileNotFoundError)):  # before Linux 6.9, /proc is asked first
            threads.duplicate(first.pid, fds[first.pid])
        assert inode_by(threads, second.pid, fds[second.pid]) == inodes[second.pid]
    threads.close()
    assert threads.descriptors() == set()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.root  # chooses a process id
def test_a_process_with_the_id_of_one_that_has_ended_is_not_taken_for_it() -> None:
    threads = Threads()
    try:
        assert any(is_an_id_used_again(threads) for _ in range(TRIES))
    finally:
        threads.close()


def is_an_id_used_again(threads: Threads) -> bool:
    """Look at a process, and then at another one with its id; False if that cannot be had."""
    with socket.socket() as made:
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        try:
            assert inode_by(threads, pid, made.fileno()) == os.fstat(made.fileno()).st_ino
        finally:
            end(pid)
        fd = made.fileno()
    with socket.socket() as later:
        assert later.fileno() == fd
        if not any(fork_as(pid) for _ in range(TRIES_OF_ONE)):
            return False
        try:
            assert inode_by(threads, pid, fd) == os.fstat(later.fileno()).st_ino
        finally:
            end(pid)
    return True


def test_a_socket_whose_place_was_taken_is_looked_for_only_when_it_has_to_be() -> None:
    threads = Threads()
    with socket.create_server(("127.0.0.1", 0)) as made, made.dup() as moved:
        own = Own(made.getsockname()[1], threads)
        inode, fd = os.fstat(made.fileno()).st_ino, made.fileno()
        own.add(inode, os.getpid(), fd, "127.0.0.1", shares=False)
        made.close()
        with socket.socket() as later:
            assert later.fileno() == fd
            own.place(os.fstat(later.fileno()).st_ino, os.getpid(), fd)
            assert own.duplicates() == []
            assert threads.descriptors() == set()  # nobody was asked
            [found] = own.duplicates(is_thorough=True)
            try:
                assert os.fstat(found.fileno()).st_ino == os.fstat(moved.fileno()).st_ino == inode
            finally:
                found.close()
    threads.close()
