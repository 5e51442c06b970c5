"""The surroundings of a server of a host: its directory, its standard streams, its umask. A process is in one at a time.

The host comes back to surroundings of its own: `/`, /dev/null, and a umask that makes files for this user alone.
"""

from __future__ import annotations

import os

from portexec.kernel import STDERR, STDIN, STDOUT


class Home:
    """The surroundings of the host itself."""

    __slots__ = ("null", "root", "silent", "silent_end")

    def __init__(self) -> None:
        """Make them, and enter them. Raises OSError."""
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.silent, self.silent_end = os.pipe()
        self.root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.enter()

    def enter(self) -> None:
        """Enter them again."""
        for stream in (STDIN, STDOUT, STDERR):
            os.dup2(self.null, stream)
        os.fchdir(self.root)
        os.umask(0o077)

    def silence(self) -> int:
        """Standard input for a server: an open, silent pipe, which ends with the host. Raises OSError.

        Some servers end when their standard input does. Each opens the pipe anew, since a server may make its own non-blocking.
        """
        return os.open(f"/proc/self/fd/{self.silent}", os.O_RDONLY | os.O_CLOEXEC)


class Surroundings:
    """The surroundings of one server, entered for each step of its run. Owns its descriptors."""

    __slots__ = ("directory", "home", "input", "output", "umask")

    def __init__(self, home: Home, directory: int, output: int, input: int, umask: int) -> None:
        self.home = home
        self.directory = directory
        self.output = output
        self.input = input
        self.umask = umask

    def __enter__(self) -> None:
        os.dup2(self.input, STDIN)
        os.dup2(self.output, STDOUT)
        os.dup2(self.output, STDERR)
        os.umask(self.umask)
        try:
            os.fchdir(self.directory)
        except OSError:
            os.chdir("/proc")  # where no file can be made; `require_directory` raises before a start

    def __exit__(self, *_: object) -> None:
        self.home.enter()

    def require_directory(self) -> None:
        """Raise OSError where the directory cannot be entered."""
        os.fchdir(self.directory)

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in (self.directory, self.output, self.input):
            os.close(fd)
