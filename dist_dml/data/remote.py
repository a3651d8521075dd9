"""Whole files from s3://, gs:// and http(s)://, through fsspec, in bounded memory.

Each request has a timeout and is tried again, a stream goes on where it broke off, and an object
that changes while it is read is an error.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dist_dml.data.faults import StorageFault
from dist_dml.data.progress import ProgressLine
from dist_dml.data.remote_client import (
    HttpAnswer,
    RemoteFile,
    call,
    file_of,
    file_system,
    is_http,
    stat,
    wait,
)
from dist_dml.data.retry import Retry, ShortAnswer, hide_secrets
from dist_dml.errors import UsageError

DEFAULT_RETRY = Retry(6, 0.5)
"""As `data.storage` has it by default."""
BLOCK = 8 * 2**20
"""Bytes of a request to an object store, and of the buffers."""
_PIECE = 2**20
"""Bytes that are handed over at a time while an answer comes in; 0.1 ms each."""
_MANY = 64
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_remote(path: str) -> bool:
    """Whether `path` is a URL, other than of a local file."""
    return "://" in path and not path.startswith("file://")


def check_clients(urls: Sequence[str]) -> None:
    """Refuse URLs whose client is not installed, before anything is read.

    Raises:
        UsageError: names what to install.
    """
    for url in {url.split("://")[0]: url for url in urls}.values():
        file_system(url)


def stat_remote(url: str, retry: Retry = DEFAULT_RETRY) -> RemoteFile:
    """Size and tag of an object now.

    Raises:
        UsageError: no client for such URLs is installed.
        StorageFault: it is not there, not for us, of unknown size, or the storage did not answer.
    """
    fs, path = file_system(url)
    return retry.run(url, lambda: stat(fs, path, url))


def list_remote(pattern: str, retry: Retry = DEFAULT_RETRY) -> list[RemoteFile]:
    """The tars that a URL names, sorted: one file, `*` in the last part, a folder, or `{0..9}`.

    Ranges as `{000000..000127}` are written out and each file is asked for; web servers need them
    unless they list their folders. `${NAME}` stays in the names of the files.

    Raises:
        UsageError: nothing fits, or no client for such URLs is installed.
        StorageFault: as `stat_remote`.
    """
    fs, path = file_system(pattern)
    urls = _written_out(pattern)
    if len(urls) > 1 or ("*" not in pattern and pattern.split("?")[0].endswith(".tar")):
        return _stat_all(urls, retry)
    path = path.partition("?")[0]
    folder, _, name = path.rpartition("/") if "*" in path else (path.rstrip("/"), "", "*.tar")
    if "*" in folder:
        raise UsageError(f"{hide_secrets(pattern)}: * may stand in the last part alone")
    fits = re.compile(".*".join(re.escape(part) for part in name.split("*")))

    def entries() -> list[Any]:
        fs.invalidate_cache()
        return call(fs, "ls", f"{folder}/" if is_http(fs) else folder, True)

    found = {
        entry["name"]: entry
        for entry in retry.run(pattern, entries)
        if fits.fullmatch(entry["name"].rpartition("/")[2]) and entry["type"] == "file"
    }
    if is_http(fs):
        inside = [url for url in sorted(found) if url.rpartition("/")[0] == folder]
        files = _stat_all(inside, retry)
    else:
        files = [file_of(fs.unstrip_protocol(name), found[name]) for name in sorted(found)]
    if "${" in pattern:
        files = _named_as_given(files, pattern, folder)
    if not files:
        raise UsageError(
            f"{hide_secrets(pattern)}: no file {name} there; web servers that list no folders need "
            "a range as in https://host/train-{000000..000127}.tar"
        )
    return files


def _named_as_given(files: list[RemoteFile], pattern: str, folder: str) -> list[RemoteFile]:
    """Listed files, whose names hold what `${NAME}` stands for, with `${NAME}` again."""
    path = pattern.partition("?")[0]
    given = path.rpartition("/")[0] if "*" in path else path.rstrip("/")
    if file_system(given)[1].rstrip("/") != folder.rstrip("/"):
        raise UsageError(
            f"{hide_secrets(pattern)}: a value of ${{NAME}} has a ? or *; in a folder that is "
            "listed, write these yourself"
        )
    return [
        RemoteFile(f"{given}/{file.url.rpartition('/')[2]}", file.size, file.tag) for file in files
    ]


def open_remote(url: str, retry: Retry) -> io.BufferedReader:
    """An object as a buffered stream, made for reading from the start to the end.

    Holds 16 MiB at most. Faults are tried again from where they struck, or up to 1 MB before:
    aiohttp forgets what it has not handed over. `seek` asks anew from its place.

    Raises:
        UsageError: no client for such URLs is installed.
        StorageFault: as `stat_remote`; while reading also if the object changed.
    """
    return io.BufferedReader(_RemoteStream(stat_remote(url, retry), retry, None), BLOCK)


def read_blocks(
    file: RemoteFile, retry: Retry, stop: threading.Event | None = None
) -> Generator[bytes, None, None]:
    """The content in pieces of at most 8 MiB, whose sizes add up to `file.size`.

    Raises:
        UsageError, StorageFault: as `open_remote`.
        Interrupted: `stop` was set.
    """
    with _RemoteStream(file, retry, stop) as stream:
        while block := stream.next_block(BLOCK):
            yield block


def read_range(file: RemoteFile, offset: int, size: int, retry: Retry) -> bytes:
    """`size` bytes of an object from `offset` on, fewer at its end.

    Raises:
        UsageError, StorageFault: as `open_remote`.
    """
    with _RemoteStream(file, retry, None) as stream:
        stream.seek(offset)
        data = b""
        while len(data) < size and (block := stream.next_block(size - len(data))):
            data += block
        return data


def fetch_remote(file: RemoteFile, target: Path, retry: Retry) -> None:
    """Bring an object to `target`, which appears when it is whole.

    Raises:
        UsageError, StorageFault: as `open_remote`; the object changed since `file` was made.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as stream:
            for block in read_blocks(file, retry):
                stream.write(block)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


class _RemoteStream(io.RawIOBase):
    """An object's bytes in order, over as many connections as it takes."""

    def __init__(self, file: RemoteFile, retry: Retry, stop: threading.Event | None) -> None:
        self._file, self._retry, self._stop = file, retry, stop
        self._fs, self._path = file_system(file.url)
        self._read = self._from_http if is_http(self._fs) else self._from_store
        self._position, self._compared = 0, False
        self._answer: HttpAnswer | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if start + offset != self._position:
            self._hang_up()
            self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        data = self.next_block(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def next_block(self, most: int) -> bytes:
        """Between 1 and `most` bytes; none at the end."""
        wanted = min(most, self._file.size - self._position)
        if wanted <= 0:
            if self._compared:  # Nothing that was read belongs to another version.
                self._again(self._compare)
                self._compared = False
            return b""
        data = self._again(lambda: self._some(wanted))
        self._position += len(data)
        return data

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _again(self, call: Callable[[], Any]) -> Any:
        return self._retry.run(self._file.url, call, stop=self._stop)

    def _some(self, wanted: int) -> bytes:
        """Between 1 and `wanted` bytes from the present position."""
        try:
            data = self._read(wanted)
            if not data:
                size = self._file.size
                raise ShortAnswer(f"the answer ended at byte {self._position} of {size}")
        except BaseException:
            self._hang_up()
            raise
        return data

    def _from_http(self, wanted: int) -> bytes:
        if self._answer is None:
            request = HttpAnswer.get(self._fs, self._path, self._position)
            self._answer = wait(self._fs, request, self._stop)
            # Each answer states size and tag of what it sends: no change stays unseen.
            self._refuse_change(self._answer.file(self._file.url))
        return wait(self._fs, self._answer.read(min(wanted, _PIECE)), self._stop)

    def _from_store(self, wanted: int) -> bytes:
        """A store's blocks do not say of which version they are: it is asked before and after."""
        if not self._compared:
            self._compare()
        end = self._position + min(wanted, BLOCK)
        data = call(self._fs, "cat_file", self._path, self._position, end, stop=self._stop)
        return data[: end - self._position]

    def _compare(self) -> None:
        self._refuse_change(stat(self._fs, self._path, self._file.url, self._stop))
        self._compared = True

    def _refuse_change(self, found: RemoteFile) -> None:
        file = self._file
        if found.size != file.size or (file.tag and found.tag and found.tag != file.tag):
            raise StorageFault(
                f"{hide_secrets(file.url)} changed: it has {found.size} bytes (tag {found.tag!r}) "
                f"and was indexed with {file.size} ({file.tag!r}); index the data set again"
            )

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._fs.loop.call_soon_threadsafe(self._answer.response.close)
            self._answer = None


def _written_out(pattern: str) -> list[str]:
    """Every URL that a pattern with ranges stands for; numbers keep the width of the first."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    numbers = range(int(first), int(last) + 1)
    if not 0 < len(numbers) <= 10**6:
        raise UsageError(f"{hide_secrets(pattern)}: {match[0]} is empty or above a million files")
    return [
        url
        for number in numbers
        for url in _written_out(
            f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
        )
    ]


def _stat_all(urls: Sequence[str], retry: Retry) -> list[RemoteFile]:
    if len(urls) <= 1:
        return [stat_remote(url, retry) for url in urls]
    progress = ProgressLine("asking for sizes", len(urls), "files") if len(urls) > _MANY else None
    files = []
    pool = ThreadPoolExecutor(min(16, len(urls)))
    try:
        for file in pool.map(lambda url: stat_remote(url, retry), urls):
            files.append(file)
            if progress is not None:
                progress.advance(1)
    finally:
        pool.shutdown(cancel_futures=True)
    if progress is not None:
        progress.finish()
    return files
