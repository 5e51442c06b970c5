"""Binds the number in $PORT in one of many ways and prints what came of it as JSON: `binder.py CASE [reuse]`.

tests/support/binds.py has what comes of each on any Linux. `reuse`: each TCP socket has SO_REUSEADDR, as most servers set it.
"""

import ctypes
import errno
import os
import select
import struct
import sys

import quick_json as json  # type: ignore[import-not-found]
import quick_socket as socket  # type: ignore[import-not-found]

PORT = int(os.environ.get("PORT", "0"))
LOCAL = ("127.0.0.1", PORT)
REUSEADDR = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
REUSEPORT = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
V6ONLY = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
DUAL = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
MPTCP = 262
libc = ctypes.CDLL(None, use_errno=True)

REUSES = sys.argv[2:] == ["reuse"]


def tcp(*options, family=socket.AF_INET, proto=0):
    made = socket.socket(family, socket.SOCK_STREAM, proto)
    for option in (REUSEADDR, *options) if REUSES else options:
        made.setsockopt(*option)
    return made


def attempt(call, *arguments):
    """`ok`, or the name of the error."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return "ok"


def serve(made, address=LOCAL):
    return [attempt(made.bind, address), attempt(made.listen)]


def answers(address=LOCAL, family=socket.AF_INET):
    client = socket.socket(family)
    client.settimeout(10)
    return attempt(client.connect, address)


def plain():
    made = tcp()
    return [*serve(made), made.getsockname()[1] == PORT, answers()]


def in_thread():
    import threading

    result = []
    thread = threading.Thread(target=lambda: result.extend(plain()))
    thread.start()
    thread.join()
    return result


def after_leader_exit():
    """The main thread ends by itself (SYS_exit), another one binds and reports."""
    import threading

    def work():
        main = threading.main_thread().native_id
        while open(f"/proc/{os.getpid()}/task/{main}/stat").read().rpartition(")")[2].split()[0] != "Z":
            os.sched_yield()
        print(json.dumps(plain()), flush=True)
        os._exit(0)

    threading.Thread(target=work).start()
    libc.syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)


def unshared_table():
    """A thread with a descriptor table of its own (CLONE_FILES undone)."""
    import threading

    result = []

    def work():
        libc.unshare(0x400)
        result.extend(plain())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return result


def epoll_before():
    made = tcp()
    made.setblocking(False)
    poll = select.epoll()
    poll.register(made, select.EPOLLIN)
    served = serve(made)
    client = socket.create_connection(LOCAL)
    events = [event for fd, event in poll.poll(10) if fd == made.fileno() and event & select.EPOLLIN]
    client.close()
    return [*served, len(events)]


def dup_before():
    made = tcp()
    copy = made.dup()
    return [attempt(made.bind, LOCAL), attempt(copy.listen), copy.getsockname() == made.getsockname()]


def options_kept():
    wanted = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 7),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
        (socket.IPPROTO_IP, socket.IP_TOS, 16),
    ]
    names = [option[:2] for option in wanted] + [REUSEADDR[:2], REUSEPORT[:2], (socket.SOL_SOCKET, socket.SO_RCVBUF)]
    made = tcp(*wanted)
    before = [made.getsockopt(*name) for name in names]
    flags = made.fileno(), os.fstat(made.fileno()).st_uid, made.getblocking(), os.get_inheritable(made.fileno())
    served = serve(made)
    same = before == [made.getsockopt(*name) for name in names]
    return [
        *served,
        same,
        flags == (made.fileno(), os.fstat(made.fileno()).st_uid, made.getblocking(), os.get_inheritable(made.fileno())),
    ]


def both_families():
    four, six = tcp(), tcp(V6ONLY, family=socket.AF_INET6)
    return [*serve(four, ("0.0.0.0", PORT)), *serve(six, ("::", PORT)), answers(), answers(("::1", PORT), socket.AF_INET6)]


def dual_then_v4():
    dual = tcp(DUAL, family=socket.AF_INET6)
    return [*serve(dual, ("::", PORT)), attempt(tcp().bind, ("0.0.0.0", PORT))]


def same_twice():
    first = tcp(REUSEADDR)
    return [*serve(first), attempt(tcp(REUSEADDR).bind, LOCAL), answers()]


def workers():
    first, second, third = tcp(REUSEPORT), tcp(REUSEPORT), tcp()
    served = [*serve(first), *serve(second), attempt(third.bind, LOCAL)]
    return [*served, first.getsockopt(*REUSEPORT[:2]), second.getsockopt(*REUSEPORT[:2])]


def mptcp():
    made = tcp(proto=MPTCP)
    return [*serve(made), made.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL), answers()]


def udp():
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound = attempt(made.bind, LOCAL)
    made.sendto(b"x", LOCAL)
    made.settimeout(10)
    return [bound, made.recv(1).decode()]


def other_families():
    local = socket.socket(socket.AF_UNIX)
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    return [attempt(local.bind, f"\0portexec-test-{os.getpid()}"), attempt(local.listen), attempt(netlink.bind, (0, 0))]


def any_number():
    made = [tcp() for _ in range(64)]
    return [{attempt(m.bind, ("127.0.0.1", 0)) for m in made} == {"ok"}, PORT in {m.getsockname()[1] for m in made}]


def mapped():
    made = tcp(DUAL, family=socket.AF_INET6)
    return [*serve(made, ("::ffff:127.0.0.1", PORT)), answers()]


def missing_address():
    return [attempt(tcp().bind, ("192.0.2.77", PORT))]


def rebind():
    made = tcp()
    return [attempt(made.bind, LOCAL), attempt(made.bind, LOCAL), attempt(made.bind, ("127.0.0.1", 0))]


def bind_then_connect():
    target = tcp()
    target.bind(("127.0.0.1", 0))
    target.listen()
    made = tcp()
    return [attempt(made.bind, LOCAL), attempt(made.connect, target.getsockname()), made.getsockname()[1] == PORT]


def listen_unbound():
    made = tcp()
    return [attempt(made.listen), made.getsockname()[1] not in (0, PORT)]


def listen_twice():
    made = tcp()
    return [*serve(made), attempt(made.listen, 5), answers()]


def fork_between():
    made = tcp()
    bound = attempt(made.bind, LOCAL)
    pid = os.fork()
    if pid == 0:
        os._exit(attempt(made.listen) != "ok")
    return [bound, os.waitpid(pid, 0)[1], answers()]


def orphan():
    """A process that forked twice binds: nobody but the subreaper is above it."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        parent = os.getpid()
        if os.fork():
            os._exit(0)
        os.setsid()
        while os.getppid() == parent:
            os.sched_yield()
        os.write(writer, json.dumps(plain()).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(reader, 1000))


def again():
    """Three servers one after the other, with shutdown(), with a connection that outlives its listener, with TIME_WAIT."""
    results = []
    kept: list[object] = []
    for _ in range(3):
        made = tcp(REUSEADDR)
        results.append(serve(made))
        client = socket.create_connection(LOCAL)
        server, _ = made.accept()
        if len(kept) == 1:
            server.close()
            client.recv(1)
        kept.append((client, server))
        made.shutdown(socket.SHUT_RDWR)
        made.close()
    return results


def shutdown_listen():
    """The number stays after shutdown(2), and the same socket listens again."""
    made = tcp()
    served = serve(made)
    made.shutdown(socket.SHUT_RDWR)
    return [*served, attempt(made.listen), made.getsockname()[1] == PORT, answers()]


def stuck_worker():
    """An old listener that does not let go is in the way of a new one, as it would be without us."""
    old = tcp(REUSEADDR)
    return [*serve(old), *serve(tcp(REUSEADDR))[:1]]


def drop_before_socket():
    os.setgid(65534)
    os.setuid(65534)
    return plain()


def drop_after_socket():
    made = tcp()
    os.setgid(65534)
    os.setuid(65534)
    return [*serve(made), answers()]


def other_network():
    """In another network namespace the number is another's, and free."""
    libc.unshare(0x40000000)
    made = tcp((socket.IPPROTO_IP, 15, 1))
    return [*serve(made), made.getsockname()[1] == PORT]


def not_dumpable():
    libc.prctl(4, 0, 0, 0, 0)
    made = tcp(REUSEADDR)
    return [*serve(made), answers()]


def short_address():
    """Too short, too long, and a wild pointer: the kernel's own errors."""
    made = tcp()
    address = struct.pack("=H", socket.AF_INET) + struct.pack("!H", PORT) + bytes(12)
    results = []
    for pointer, length in ((address, 15), (address, 4), (address + bytes(200), 200), (ctypes.c_void_p(8), 16), (address, -1)):
        libc.bind(made.fileno(), pointer, length)
        results.append(errno.errorcode[ctypes.get_errno()])
    return results


def unspecified_family():
    """bind(2) takes AF_UNSPEC for AF_INET when the address is 0.0.0.0."""
    made = tcp()
    address = struct.pack("=H", socket.AF_UNSPEC) + struct.pack("!H", PORT) + bytes(12)
    return [libc.bind(made.fileno(), address, 16), attempt(made.listen), made.getsockname()[1] == PORT, answers()]


def no_descriptor():
    """Not open, a file, negative: the kernel's own errors."""
    address = struct.pack("=H", socket.AF_INET) + struct.pack("!H", PORT) + bytes(12)
    results = []
    for fd in (999, os.open("/dev/null", os.O_RDONLY), -1):
        libc.bind(fd, address, 16)
        results.append(errno.errorcode[ctypes.get_errno()])
        libc.listen(fd, 1)
        results.append(errno.errorcode[ctypes.get_errno()])
    return results


def state():
    with open("/proc/self/status") as file:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file)
    return [fields["NoNewPrivs"].strip(), fields["Seccomp"].strip(), sorted(map(int, os.listdir("/proc/self/fd")))[:-1]]


if __name__ == "__main__":
    outcome = globals()[sys.argv[1]]()
    print(json.dumps(outcome), flush=True)
