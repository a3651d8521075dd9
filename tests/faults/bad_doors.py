"""A door before a real server: what passes through it, and how badly, is up to the test."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
from launching import free_port

Fault = int | float | str | None


@dataclass(frozen=True)
class Request:
    """A request that came to the door."""

    method: str
    path: str
    body: bytes

    @property
    def writes(self) -> bool:
        """Whether it asks the server to change something."""
        return self.method != "GET" and not self.path.endswith("/search")

    @property
    def has_metrics(self) -> bool:
        """Whether it brings records."""
        return self.path.endswith("/runs/log-batch") and b'"metrics": [{' in self.body


@dataclass
class Door:
    """A port of the loopback that leads to a server.

    Attributes:
        server: port of the server behind it.
        behave: what happens to a request. A status is answered without asking the server; "silent"
            never answers; seconds are waited before the request is passed on; "lost" passes it on
            and hangs up instead of answering. None does well.
        port: of the door, which stays the same when it is shut and opened.
        requests: all that came.
        visitors: the command line of the process behind each connection.
    """

    server: int
    behave: Callable[[Request], Fault] = lambda request: None
    port: int = field(default_factory=free_port)
    requests: list[Request] = field(default_factory=list)
    visitors: list[str] = field(default_factory=list)
    healed: threading.Event = field(default_factory=threading.Event)
    _listener: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Listen. A door that was never opened refuses connections."""
        if self._listener is None:
            self._listener = ThreadingHTTPServer(("127.0.0.1", self.port), partial(_Handler, self))
            self._listener.daemon_threads = True
            self._listener.block_on_close = False
            serve = partial(self._listener.serve_forever, 0.05)
            threading.Thread(target=serve, daemon=True).start()

    def heal(self) -> None:
        """From now on everything passes, also where nobody listened before."""
        self.healed.set()
        self.open()

    def close(self) -> None:
        """Listen no more, and let go of whoever still waits for an answer."""
        self.healed.set()
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def __init__(self, door: Door, *args) -> None:
        self.door = door
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.door.visitors.append(_command_behind(self.client_address))

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path.partition("?")[0], body)
        self.door.requests.append(request)
        fault = None if self.door.healed.is_set() else self.door.behave(request)
        if fault == "silent":
            self.door.healed.wait()
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send(fault, [("Content-Type", "text/plain")], b"on a bad day")
            return
        if isinstance(fault, float):
            time.sleep(fault)
        status, headers, content = self._ask_server(body)
        if fault == "lost":
            self.close_connection = True
        else:
            self._send(status, headers, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def _ask_server(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.door.server, timeout=60)
        _connect(connection)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() in ("content-type", "etag")]
        return answer.status, kept, content

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # The client had enough.
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


def _connect(connection: http.client.HTTPConnection) -> None:
    """Wait for a server that is still starting, which takes MLflow several seconds."""
    deadline = time.monotonic() + 60
    while True:
        try:
            connection.connect()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _command_behind(address: tuple[str, int]) -> str:
    """The command line of the process whose end of a connection this is."""
    for connection in psutil.net_connections("tcp4"):
        if connection.laddr == address and connection.pid is not None:
            with suppress(psutil.NoSuchProcess):
                return " ".join(psutil.Process(connection.pid).cmdline())
    return "gone already"


@contextmanager
def doors_to(server: int, **behaviours: Callable[[Request], Fault]) -> Iterator[dict[str, Door]]:
    """A door for each behaviour; they are not open yet."""
    doors = {name: Door(server, behave) for name, behave in behaviours.items()}
    try:
        yield doors
    finally:
        for door in doors.values():
            door.close()
