"""Binds $PORT in sixteen threads without a pause, and says `spins` when all of them do."""

from __future__ import annotations

import os
import socket
import threading

THREADS = 16


def spin(port, barrier):
    while True:
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                made.bind(("127.0.0.1", port))
            except OSError:
                pass
        if barrier is not None:
            barrier.wait()
            barrier = None


def main():
    barrier = threading.Barrier(THREADS + 1)
    for _ in range(THREADS):
        threading.Thread(target=spin, args=(int(os.environ["PORT"]), barrier), daemon=True).start()
    barrier.wait()
    print("spins", flush=True)
    threading.Event().wait()


main()
