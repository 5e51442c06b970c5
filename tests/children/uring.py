"""Binds 127.0.0.1 and $PORT by io_uring, and listens by it; prints what came of each. Status 77 where it cannot be had.

linux/io_uring.h: struct io_uring_params has the offsets in the rings at 40 and 80; struct io_uring_sqe has 64 bytes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys

import quick_socket as socket  # type: ignore[import-not-found]

SETUP, ENTER = 425, 426
AT_SQ, AT_CQ, AT_ENTRIES = 0, 0x8000000, 0x10000000
GET_EVENTS = 1
BIND, LISTEN = 56, 57  # Linux 6.11
NOT_HERE = 77

libc = ctypes.CDLL(None, use_errno=True)


class Ring:
    """One ring of one entry, used again and again."""

    def __init__(self):
        parameters = ctypes.create_string_buffer(120)
        self.fd = libc.syscall(SETUP, 1, parameters)
        if self.fd < 0:
            sys.exit(NOT_HERE)
        self.sq = struct.unpack_from("7I", parameters, 40)  # head, tail, mask, entries, flags, dropped, array
        self.cq = struct.unpack_from("6I", parameters, 80)  # head, tail, mask, entries, overflow, cqes
        self.submitted, self.completed, self.entries = (
            mmap.mmap(self.fd, mmap.PAGESIZE, offset=at) for at in (AT_SQ, AT_CQ, AT_ENTRIES)
        )

    def do(self, call, fd, *, offset=0, address=0, length=0):
        struct.pack_into("BBHiQQI", self.entries, 0, call, 0, 0, fd, offset, address, length)
        [tail] = struct.unpack_from("I", self.submitted, self.sq[1])
        struct.pack_into("I", self.submitted, self.sq[6], 0)
        struct.pack_into("I", self.submitted, self.sq[1], tail + 1)
        if libc.syscall(ENTER, self.fd, 1, 1, GET_EVENTS, None, 0) != 1:
            sys.exit(NOT_HERE)
        [head] = struct.unpack_from("I", self.completed, self.cq[0])
        [_, mask] = struct.unpack_from("II", self.completed, self.cq[1])
        _, result = struct.unpack_from("Qi", self.completed, self.cq[5] + 16 * (head & mask))
        struct.pack_into("I", self.completed, self.cq[0], head + 1)
        return errno.errorcode[-result] if result < 0 else "ok"


def main():
    ring = Ring()
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port = int(os.environ["PORT"]).to_bytes(2, "big")
    packed = socket.AF_INET.to_bytes(2, sys.byteorder) + port + bytes((127, 0, 0, 1)) + bytes(8)
    address = ctypes.create_string_buffer(packed, len(packed))
    bound = ring.do(BIND, made.fileno(), offset=len(packed), address=ctypes.addressof(address))
    if bound == "EINVAL":
        sys.exit(NOT_HERE)
    print("bind", bound)
    if bound != "ok":
        sys.exit(1)
    print("listen", ring.do(LISTEN, made.fileno(), length=8))


main()
