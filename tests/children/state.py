"""Print as JSON all that a process can see of how it was started."""

import json
import os
import resource
import signal
import sys


def descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target != f"/proc/{os.getpid()}/fd":
            found[int(name)] = target
    return found


def status():
    with open("/proc/self/status") as file:
        fields = dict(line.rstrip("\n").split(":", 1) for line in file)
    names = "Uid Gid Groups Umask SigQ SigPnd ShdPnd SigBlk SigIgn SigCgt CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp"
    return {name: fields[name].strip() for name in names.split() if name not in ("SigQ", "SigCgt", "SigIgn")}


def environment():
    with open("/proc/self/environ", "rb") as file:
        entries = file.read().split(b"\0")[:-1]
    return sorted(entry.decode(errors="surrogateescape") for entry in entries)


def ignored():
    # Python itself ignores SIGPIPE and SIGXFSZ; what was there before main() is asked of a child made without it.
    return None


json.dump(
    {
        "argv": sys.argv[1:],
        "cwd": os.getcwd(),
        "descriptors": descriptors(),
        "environment": environment(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT")},
        "nice": os.nice(0),
        "affinity": sorted(os.sched_getaffinity(0)),
        "pgrp": os.getpgrp(),
        "session": os.getsid(0),
        "ppid": os.getppid(),
        "status": status(),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "umask": oct(os.umask(0)),
    },
    sys.stdout,
)
