"""A web server over TLS, by a certificate of its own: `secure.py PEM-FILE`. It answers `secure` to `/`, and 404 to all else."""

import http.server
import os
import ssl
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Content-Length", "7")  # else the end of the answer is the end of TLS, which newer curls want to see
        self.end_headers()
        self.wfile.write(b"secure\n")

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        pass  # who asks without TLS is no news here


server = Server(("127.0.0.1", int(os.environ["PORT"])), Handler, bind_and_activate=False)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.server_bind()
server.server_activate()
server.serve_forever()
