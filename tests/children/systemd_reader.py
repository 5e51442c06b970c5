"""Reads what socket activation handed to it by libsystemd alone, and prints it as one line of JSON.

Each argument is a call to make, after the sockets were counted: `sd_is_socket_inet,FD,FAMILY,TYPE,LISTENING,PORT`. A path
that begins with @ is an abstract name.
"""

from __future__ import annotations

import ctypes
import os
import sys

import quick_json as json  # type: ignore[import-not-found]

INT = ctypes.c_int
libsystemd = ctypes.CDLL("libsystemd.so.0")
libsystemd.sd_listen_fds_with_names.argtypes = [INT, ctypes.POINTER(ctypes.POINTER(ctypes.c_char_p))]
libsystemd.sd_is_socket.argtypes = [INT, INT, INT, INT]
libsystemd.sd_is_socket_inet.argtypes = [INT, INT, INT, INT, ctypes.c_uint16]
libsystemd.sd_is_socket_unix.argtypes = [INT, INT, INT, ctypes.c_char_p, ctypes.c_size_t]


def sockets() -> tuple[int, list[str]]:
    """How many descriptors there are, or a negative error number, and their names."""
    names = ctypes.POINTER(ctypes.c_char_p)()
    count = libsystemd.sd_listen_fds_with_names(0, ctypes.byref(names))
    return count, [os.fsdecode(names[position] or b"") for position in range(max(count, 0))]


def call(text: str) -> int:
    """What the function answers: above 0 for yes, 0 for no, a negative error number."""
    function, *arguments = text.split(",")
    if function == "sd_is_socket_unix":
        path = os.fsencode(arguments.pop())
        length = len(path)
        path = b"\0" + path[1:] if path.startswith(b"@") else path
        return int(libsystemd.sd_is_socket_unix(*map(int, arguments), path, length))
    return int(getattr(libsystemd, function)(*map(int, arguments)))


def pidfd() -> tuple[str, str]:
    """The inode number of our own pidfd, and the type of the file system that it is on, in hexadecimal."""
    fd = os.pidfd_open(os.getpid())
    status = (ctypes.c_long * 64)()  # struct statfs begins with f_type
    assert ctypes.CDLL(None).fstatfs(fd, status) == 0
    return str(os.fstat(fd).st_ino), f"{status[0]:X}"


count, names = sockets()
inode, file_system = pidfd()
print(
    json.dumps(
        {
            "count": count,
            "names": names,
            "answers": [call(text) for text in sys.argv[1:]],
            "variables": {name: value for name, value in os.environ.items() if name.startswith("LISTEN_")},
            "pid": str(os.getpid()),
            "pidfd_inode": inode,
            "pidfd_file_system": file_system,
        }
    )
)
