"""A web server on the loopback that answers as object stores do on a bad day."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class ShardServer:
    """What is served, and what goes wrong with it.

    Attributes:
        files: content by name.
        faults: what happens to the next requests of a name, one each: a status, ("cut", n) sends n
            bytes of the answer and hangs up, ("stall", seconds) says nothing for so long, and
            "drop" hangs up at once. None answers well.
        always: what happens to every request of a name that has no fault left.
        requests: name and first byte asked for, of every request.
        ranges: whether byte ranges are known.
        tags: whether answers carry an ETag.
        authorization: the header that requests must have; without one, or with another, 401.
        query: what must stand behind the ?, however it is quoted; else 403.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, deque] = field(default_factory=lambda: defaultdict(deque))
    always: dict[str, object] = field(default_factory=dict)
    requests: list[tuple[str, int]] = field(default_factory=list)
    ranges: bool = True
    tags: bool = True
    authorization: str = ""
    query: str = ""
    on_request: Callable[[str], None] | None = None

    def starts(self, name: str, at_least: int = -1) -> list[int]:
        """First bytes of the requests for a name."""
        return [start for asked, start in self.requests if asked == name and start >= at_least]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20

    def __init__(self, state: ShardServer, *args) -> None:
        self.state = state
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        state, name = self.state, self.path.partition("?")[0].lstrip("/")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        state.requests.append((name, start))
        if state.on_request is not None:
            state.on_request(name)
        fault = state.faults[name].popleft() if state.faults[name] else state.always.get(name)
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, tuple) and fault[0] == "stall":
            time.sleep(fault[1])
        if isinstance(fault, int):
            self._status(fault)
        elif state.authorization not in ("", self.headers.get("Authorization")):
            self._status(401)
        elif unquote(state.query) not in ("", unquote(self.path.partition("?")[2])):
            self._status(403)
        elif name.endswith("/") or not name:
            self._folder(name)
        elif name not in state.files:
            self._status(404)
        else:
            self._file(state.files[name], wanted, fault)

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _folder(self, name: str) -> None:
        inside = [file.removeprefix(name) for file in self.state.files if file.startswith(name)]
        links = "".join(f'<a href="{file}">{file}</a>\n' for file in ["../", *inside])
        page = f"<html><body>{links}</body></html>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def _file(self, content: bytes, wanted: re.Match | None, fault: object) -> None:
        body, status = memoryview(content), 200  # Not a copy: tests measure memory.
        if wanted and self.state.ranges:
            start, last = int(wanted[1]), int(wanted[2]) if wanted[2] else len(content) - 1
            body, status = body[start : last + 1], 206 if start < len(content) else 416
        self.send_response(status)
        if status == 206:
            self.send_header(
                "Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}"
            )
        elif status == 416:
            self.send_header("Content-Range", f"bytes */{len(content)}")
        if self.state.tags:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if isinstance(fault, tuple) and fault[0] == "cut":
            body = body[: fault[1]]
            self.close_connection = True
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # The client had enough.


@contextmanager
def serving() -> Iterator[ShardServer]:
    """A server on a free port of the loopback, until the block ends."""
    state = ShardServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, state))
    server.daemon_threads = True
    server.block_on_close = False
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def within(seconds: float, call: Callable[[], object]) -> object:
    """The result of `call`, or a failure after so many seconds: nothing may hang."""
    results: list[object] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it still waits after {seconds} s"
    if errors:
        raise errors[0]
    return results[0]
