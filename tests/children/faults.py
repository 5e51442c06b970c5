"""Programs for the faults of hand-off `guard`: `faults.py CASE [ARGUMENT]...`. What they find goes to stdout.

serve HOST PORT...      listens on every number (0: $PORT), `serving ADDRESS PID`; TERM ends it, after one more bind's outcome
wait                    `ready PID`, waits for a line on stdin, then serves on 127.0.0.1
storm KIND PERIOD N     binds and listens N times under a timer's signals; KIND is restart or interrupt
many                    one process for each of the injected numbers, each answers with its number; `ready` when all listen
state                   what a refused attempt might have left: subreaper, open descriptors, signals
dropped KIND            gives up root, then binds and listens; prints the outcomes and the socket's owner
headless                leaves a process whose main thread has ended: `ready PID`
io_uring                binds $PORT through a ring, which no filter sees
"""

from __future__ import annotations

import _signal as signal
import _thread
import ctypes
import errno
import mmap
import os
import select
import struct
import sys

import quick_json as json  # type: ignore[import-not-found]
import quick_socket as socket  # type: ignore[import-not-found]

libc = ctypes.CDLL(None, use_errno=True)


def outcome(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return "ok"


def listen_on(host, port):
    family = socket.AF_INET6 if ":" in host or host == "*" else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "*")
    made.bind(("::" if host == "*" else host, int(port) or int(os.environ["PORT"])))
    made.listen()
    return made


def answer_for_ever(made):
    while True:
        connection, _ = made.accept()
        with connection:
            connection.sendall(str(made.getsockname()[1]).encode())


def end(*_):
    found = outcome(socket.socket().bind, ("127.0.0.1", 0))
    os.write(1, f"SIGTERM {found}\n".encode())  # not by print, in which the signal may have come
    os._exit(3)


def heed_term():
    """Have TERM call `end`; a descriptor that can be read then. A handler misses a signal that comes just before a wait."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, end)
    return reader


def serve(host, *ports):
    reader = heed_term()
    for port in ports:
        made = listen_on(host, port)
        _thread.start_new_thread(answer_for_ever, (made,))
        print("serving", made.getsockname()[1], os.getpid(), flush=True)
    while True:
        os.read(reader, 1)


def wait():
    reader = heed_term()
    print("ready", os.getpid(), flush=True)
    select.select([0, reader], [], [])
    sys.stdin.readline()
    serve("127.0.0.1", "0")


def until_heard(call, *arguments):
    """As programs do: once more after EINTR."""
    while True:
        try:
            return call(*arguments)
        except InterruptedError:
            continue


def storm(kind, period, count):
    signals = []
    signal.signal(signal.SIGALRM, lambda *_: signals.append(1))
    signal.siginterrupt(signal.SIGALRM, kind == "interrupt")
    signal.setitimer(signal.ITIMER_REAL, float(period), float(period))
    address = ("127.0.0.1", int(os.environ["PORT"]))
    failures = []
    for _ in range(int(count)):
        with socket.socket() as made:
            done = [outcome(until_heard, made.bind, address), outcome(until_heard, made.listen)]
            if done != ["ok", "ok"] or made.getsockname() != address:
                failures.append([*done, made.getsockname()])
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps([failures, len(signals) > 0]))


def many():
    numbers = [int(value) for name, value in os.environ.items() if name.endswith("_PORT") or name == "PORT"]
    reader, writer = os.pipe()
    for number in numbers:
        if os.fork() == 0:
            made = listen_on("127.0.0.1", number)
            os.write(writer, b".")
            answer_for_ever(made)
    heard = 0
    while heard < len(numbers):
        heard += len(os.read(reader, 1000))
    print("ready", flush=True)
    signal.pause()


def state():
    subreaper = ctypes.c_int()
    libc.prctl(37, ctypes.byref(subreaper), 0, 0, 0)
    with open("/proc/self/status") as file:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file)
    links = (os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}"))
    kinds = sorted(link.partition(":")[0] for link in links)
    print(json.dumps([subreaper.value, kinds, *(fields[name].strip() for name in ("SigBlk", "SigIgn", "NoNewPrivs"))]))


def dropped(kind):
    os.setgid(65534)
    os.setuid(65534)
    family = socket.AF_INET6 if kind == "dual" else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, 262 if kind == "mptcp" else 0)
    if kind == "dual":
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if kind == "reuseport" else socket.SO_REUSEADDR, 1)
    address = ("::" if kind == "dual" else "127.0.0.1", int(os.environ["PORT"]))
    print(outcome(made.bind, address), outcome(made.listen), os.fstat(made.fileno()).st_uid)


def headless():
    if os.fork() == 0:
        main = os.getpid()

        def work():
            with open(f"/proc/{main}/task/{main}/stat") as file:
                while file.read().rpartition(")")[2].split()[0] != "Z":
                    file.seek(0)
            print("ready", main, flush=True)
            signal.pause()

        _thread.start_new_thread(work, ())
        libc.syscall(ctypes.c_long({"x86_64": 60, "aarch64": 93, "riscv64": 93}[os.uname().machine]), ctypes.c_long(0))
    signal.pause()


def io_uring():
    """io_uring_setup(2), one IORING_OP_BIND (56, Linux 6.11), io_uring_enter(2); prints its result."""
    parameters = bytearray(120)
    buffer = (ctypes.c_char * 120).from_buffer(parameters)
    ring = libc.syscall(ctypes.c_long(425), ctypes.c_long(2), buffer)
    if ring < 0:
        print("cannot", errno.errorcode[ctypes.get_errno()])
        return
    submitted = struct.unpack_from("10I", parameters, 40)  # io_sqring_offsets: head tail mask entries flags dropped array
    completed = struct.unpack_from("8I", parameters, 80)  # io_cqring_offsets: head tail mask entries overflow cqes
    shared = mmap.mmap(ring, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
    requests = mmap.mmap(ring, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0x10000000)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    address = ctypes.create_string_buffer(
        struct.pack("=H", socket.AF_INET) + struct.pack("!H", int(os.environ["PORT"])) + bytes([127, 0, 0, 1]) + bytes(8), 16
    )
    # struct io_uring_sqe: opcode, flags, priority, fd, offset (the address' length), address
    struct.pack_into("=BBHiQQ", requests, 0, 56, 0, 0, made.fileno(), 16, ctypes.addressof(address))
    struct.pack_into("=I", shared, submitted[6], 0)
    struct.pack_into("=I", shared, submitted[1], 1)
    zero = ctypes.c_long(0)
    libc.syscall(ctypes.c_long(426), ctypes.c_long(ring), ctypes.c_long(1), ctypes.c_long(1), ctypes.c_long(1), zero, zero)
    (result,) = struct.unpack_from("=i", shared, completed[5] + 8)
    print("bound" if result == 0 else errno.errorcode.get(-result, str(result)))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
