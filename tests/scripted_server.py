"""A server on a loopback address that answers each request by a function, as a hostile or broken Hub may."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Scripted"], None]


class Scripted(BaseHTTPRequestHandler):
    """Answers by a function, and records (path, authorization) of each request."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        self.server.answer(self)

    do_HEAD = do_POST = do_GET

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def drip(self, part: bytes, pause_s: float = 0.0, kind: str = "application/json") -> None:
        """Send parts without an end, until the client has enough."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(part)
                threading.Event().wait(pause_s)
        except OSError:
            self.server.cut += 1

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serving(answer: Answer) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.answer, server.seen, server.cut = answer, [], 0
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    server.url = f"http://127.0.0.1:{server.server_port}"
    with server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
