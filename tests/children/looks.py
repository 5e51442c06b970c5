"""Looks whether its number is free, and goes on: looks.py [busy] ( serve | crash ).

busy    another thread computes all the time, so that the look waits for the interpreter's lock between listen and close
serve   an HTTP server on the number, when a line has come on standard input
crash   ends with status 1
"""

import http.server
import os
import socket
import sys
import threading


def compute():
    while True:
        sum(range(1000))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"served\n")

    def log_message(self, *_):
        pass


port = int(os.environ["PORT"])
if "busy" in sys.argv:
    threading.Thread(target=compute, daemon=True).start()
for host in ("127.0.0.1", "::1"):
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    probe.bind((host, port))
    probe.listen()
    probe.close()
print("looked", flush=True)
if "crash" in sys.argv:
    sys.exit(1)
sys.stdin.readline()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
