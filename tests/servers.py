"""Web servers of tests, on this machine."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock


@contextlib.contextmanager
def serving(handler):
    """The address of a server whose requests this handler answers."""
    quiet = mock.patch.object(BaseHTTPRequestHandler, "log_message")
    with quiet, ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
