"""Prints `ready`, then the name of every signal that arrives; ends at TERM with status 3.

It does not wait in pause(2): Python would keep a signal that comes just before that call until the next one comes. A byte in a
pipe ends the wait.
"""

import _signal as signal
import os
import sys

TOLD = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT", "SIGRTMIN", "SIGRTMAX")
NAMES = {getattr(signal, name): name for name in TOLD}


def tell(number, frame):
    os.write(1, f"{NAMES[number]}\n".encode())  # in one piece: another handler may interrupt this one
    if number == signal.SIGTERM:
        sys.exit(3)


reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
for number in NAMES:
    signal.signal(number, tell)
print("ready", os.getpid(), flush=True)
while True:
    os.read(reader, 1)
