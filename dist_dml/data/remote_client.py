"""fsspec's clients with what they leave open: timeouts, identity encoding, tags, secrets hidden."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dist_dml.credentials import expand
from dist_dml.data.faults import StorageFault
from dist_dml.data.retry import Interrupted, ShortAnswer, hide_secrets
from dist_dml.errors import UsageError

T = TypeVar("T")
STALL_SECONDS = 60.0
"""A connection that says nothing for so long is given up."""
REQUEST_SECONDS = 300.0
"""One request at most: 8 MiB, or one listing."""
_TAGS = (
    *("ETag", "etag", "md5Hash", "crc32c", "Content-MD5", "Digest", "checksum"),
    *("Last-Modified", "LastModified", "updated", "mtime", "created"),
)


@dataclass(frozen=True)
class RemoteFile:
    """One object of a store as it was at some time.

    Attributes:
        url: with its scheme, as it was given: `${NAME}` stands for a password.
        size: bytes.
        tag: what changes with its content: ETag, checksum or date as text; "" where nothing does.
    """

    url: str
    size: int
    tag: str


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's client for a URL, and the path that it wants. fsspec keeps one of each kind.

    Here alone `${NAME}` becomes the environment's value: the path may hold a secret.

    Raises:
        UsageError: the client is not installed, there is none for such URLs, or an environment
            variable is not set.
    """
    scheme = url.split("://")[0]
    if "::" in url:
        raise UsageError(f"{hide_secrets(url)}: chained URLs (::) are not read; name the file")
    url = expand(url, "shard URL")
    # A listing that was true an hour ago would hide that an object has changed.
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        from fsspec.core import url_to_fs

        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
            # As curl does: proxies and passwords from the environment and .netrc.
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        return url_to_fs(url, **options)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{scheme}:// cannot be read ({reason}); pip install 'dist_dml[remote]'"
        ) from None
    except ValueError as error:
        raise UsageError(f"{hide_secrets(url)}: {hide_secrets(str(error))}") from None


def is_http(fs: Any) -> bool:
    """Whether a client speaks HTTP to a plain web server."""
    return "http" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def call(fs: Any, name: str, *args: Any, stop: threading.Event | None = None) -> Any:
    """A method of a client, with a timeout if the client is asynchronous: s3, gs and http are.

    Raises:
        TimeoutError, Interrupted: as `wait`.
    """
    if fs.async_impl:
        return wait(fs, getattr(fs, f"_{name}")(*args), stop)
    return getattr(fs, name)(*args)


def wait(fs: Any, request: Coroutine[Any, Any, T], stop: threading.Event | None = None) -> T:
    """The result of a request, which runs in fsspec's thread.

    Raises:
        TimeoutError: none within five minutes. fsspec's own calls wait for ever.
        Interrupted: `stop` was set.
    """
    limited = asyncio.wait_for(request, REQUEST_SECONDS)
    future = asyncio.run_coroutine_threadsafe(limited, fs.loop)
    try:
        while not concurrent.futures.wait([future], timeout=0.2).done:
            if stop is not None and stop.is_set():
                raise Interrupted
        return future.result()
    finally:
        future.cancel()


def stat(fs: Any, path: str, url: str, stop: threading.Event | None = None) -> RemoteFile:
    """Size and tag of an object now, in one request.

    Raises:
        StorageFault: its size is unknown, or it is a folder.
    """
    if is_http(fs):
        # Not HEAD: a signed URL is for GET alone.
        async def ask() -> RemoteFile:
            answer = await HttpAnswer.get(fs, path, 0, 1)
            if answer.response.status == 206:
                await answer.response.read()  # The connection can then be used again.
            answer.response.close()
            return answer.file(url)

        return wait(fs, ask(), stop)
    fs.invalidate_cache()
    return file_of(url, call(fs, "info", path, stop=stop))


def file_of(url: str, info: Mapping[str, Any]) -> RemoteFile:
    """A `RemoteFile` from what fsspec says of an object.

    Raises:
        StorageFault: its size is unknown, or it is a folder.
    """
    if info.get("type") == "directory" or info.get("size") is None:
        raise StorageFault(f"{hide_secrets(url)}: it is a folder, or its size is not stated")
    return RemoteFile(url, int(info["size"]), _tag_of(info))


def _tag_of(info: Mapping[str, Any]) -> str:
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    return tag.removeprefix("W/").strip('"')


class HttpAnswer:
    """The answer to a GET of everything from some byte on. Its methods run in fsspec's thread.

    fsspec's own reads ask for compressed content, and take a server's whole file into memory where
    it does not know ranges, as Python's `http.server` does not. Such a file is skipped through.
    """

    def __init__(self, response: Any, start: int) -> None:
        self.response = response
        self._skip = start if response.status == 200 else 0

    @classmethod
    async def get(cls, fs: Any, url: str, start: int, end: int | None = None) -> HttpAnswer:
        """Ask for the bytes `start` .. `end` - 1 and read the headers of the answer.

        Raises:
            Exception: aiohttp's, of the connection or the status.
            ShortAnswer: other bytes came than were asked for.
            StorageFault: the server compresses.
        """
        session = await fs.set_session()
        last = "" if end is None else end - 1
        headers = {"Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"}
        response = await session.get(fs.encode_url(url), headers=headers)
        try:
            if response.status != 416:
                response.raise_for_status()
            sent = response.headers.get("Content-Range", "")
            if response.status == 206 and not sent.startswith(f"bytes {start}-"):
                raise ShortAnswer(f"asked for bytes from {start} on, the server sent {sent!r}")
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding not in ("", "identity"):
                raise StorageFault(f"{hide_secrets(url)}: its server sends it as {encoding} only")
        except BaseException:
            response.close()
            raise
        return cls(response, start)

    def file(self, url: str) -> RemoteFile:
        """What the headers say of the object. A range beyond its end (416) states the size too.

        Raises:
            StorageFault: they do not state its size.
        """
        headers = self.response.headers
        size = headers.get("Content-Length", "")
        if self.response.status in (206, 416):
            size = headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdigit():
            raise StorageFault(f"{hide_secrets(url)}: its server does not state its size")
        return RemoteFile(url, int(size), _tag_of(headers))

    async def read(self, wanted: int) -> bytes:
        """Up to `wanted` bytes; none at the end. What came before a fault is kept."""
        content = self.response.content
        while self._skip:
            skipped = await content.read(min(self._skip, 2**20))
            if not skipped:
                return b""
            self._skip -= len(skipped)
        pieces, total = [], 0
        try:
            while total < wanted and (piece := await content.read(wanted - total)):
                pieces.append(piece)
                total += len(piece)
        except Exception:
            if not pieces:  # Else the next call meets the same fault again.
                raise
        return b"".join(pieces)
