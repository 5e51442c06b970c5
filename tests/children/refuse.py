"""Run a command under a seccomp filter of its own, as a container's profile or another sandbox would.

    refuse.py RULES COMMAND...    RULES is JSON: [[call, errno, argument, mask], ...]

A call fails with the errno if the argument (-1: no matter) has one of the mask's bits. With errno 0 it has no effect, and says
nothing. A fifth word `equal`: if the argument is the mask. The filter goes in by prctl(2), so that seccomp(2) itself can be
refused.
"""

from __future__ import annotations

import ctypes
import os
import sys

import quick_json as json  # type: ignore[import-not-found]

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LOAD, EQUAL, HAS_BITS, RETURN = 0x20, 0x15, 0x45, 0x06
TESTS = {"bits": HAS_BITS, "equal": EQUAL}
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
ARGUMENTS = 16 if sys.byteorder == "little" else 20
X86_64 = {"bind": 49, "clone": 56, "listen": 50, "pidfd_getfd": 438, "pidfd_open": 434, "prctl": 157}
X86_64 |= {"seccomp": 317, "setsockopt": 54, "socket": 41}
GENERIC = {"bind": 200, "clone": 220, "listen": 201, "pidfd_getfd": 438, "pidfd_open": 434, "prctl": 167}
GENERIC |= {"seccomp": 277, "setsockopt": 208, "socket": 198}
NUMBERS = {"x86_64": X86_64, "aarch64": GENERIC, "riscv64": GENERIC}

libc = ctypes.CDLL(None, use_errno=True)


class Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("value", ctypes.c_uint32))


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction)))


def rule(call: str, error: int, argument: int = -1, mask: int = 0, test: str = "bits") -> list[tuple[int, int, int, int]]:
    refusal = (RETURN, 0, 0, ERRNO | error)
    number = NUMBERS[os.uname().machine][call]
    if argument < 0:
        return [(LOAD, 0, 0, 0), (EQUAL, 0, 1, number), refusal]
    return [
        (LOAD, 0, 0, 0),
        (EQUAL, 0, 3, number),
        (LOAD, 0, 0, ARGUMENTS + 8 * argument),
        (TESTS[test], 0, 1, mask),
        refusal,
    ]


def install(program: list[tuple[int, int, int, int]]) -> None:
    compiled = Program(len(program), (Instruction * len(program))(*(Instruction(*line) for line in program)))
    zero = ctypes.c_ulong(0)
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(compiled), zero, zero) == 0:
        return
    libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(compiled), zero, zero) != 0:
        sys.exit(f"cannot install a filter: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    rules = [line for fields in json.loads(sys.argv[1]) for line in rule(*fields)]
    install([*rules, (RETURN, 0, 0, ALLOW)])
    os.execvp(sys.argv[2], sys.argv[2:])


main()
