"""Images behind http(s) URLs: many at a time, each within a time, a size and a few attempts.

What fails is a reason, not an exception: of a million URLs thousands are dead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dist_dml.data.retry import Retry, is_transient, reason_of
from dist_dml.errors import UsageError

_AHEAD = 8
"""Fetched images that may wait for a slow one, for each connection."""
_PIECE = 1 << 16
_RETRY = Retry(2, 1.0)
_HEADERS = {"User-Agent": "dist_dml", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Fetching:
    """How images are asked for. Picklable.

    Attributes:
        seconds: longest time of one attempt, from the first packet to the last byte: a server that
            sends a byte a minute cannot hold it up.
        largest_bytes: longest file.
        retry: further attempts after a lost connection, a timeout, HTTP 429 or 5xx.
        connections: images that are fetched at a time by one process.
    """

    seconds: float = 30.0
    largest_bytes: int = 32 << 20
    retry: Retry = _RETRY
    connections: int = 16


class _Refused(Exception):
    """The answer is no image that will be stored."""


def is_url(path: str) -> bool:
    """Whether a path of a manifest is fetched: http:// or https://."""
    return path[:8].lower().startswith(("http://", "https://"))


def fetch_images(urls: Sequence[str], fetching: Fetching) -> Generator[bytes | str, None, None]:
    """The bytes behind each URL, in order; or a few words why there are none.

    Close it where it may not be read to its end: what it holds must end in the thread that reads.
    Holds at most `8 * connections` images. Never waits longer for one than its attempts and their
    pauses take.

    Raises:
        UsageError: aiohttp is not installed.
    """
    if not urls:
        return
    try:
        import aiohttp
    except ImportError:
        raise UsageError(
            "URLs are fetched with aiohttp; install it (`pip install aiohttp`)"
        ) from None
    with asyncio.Runner() as runner:
        session = runner.run(_opened(aiohttp, fetching))
        gate = asyncio.Semaphore(fetching.connections)
        loop = runner.get_loop()
        waiting = iter(urls)
        tasks: deque[asyncio.Task[bytes | str]] = deque()
        try:
            while True:
                wanted = _AHEAD * fetching.connections - len(tasks)
                for url in islice(waiting, wanted):
                    tasks.append(loop.create_task(_fetch(session, url, fetching, gate)))
                if not tasks:
                    return
                yield runner.run(_result(tasks.popleft()))
        finally:
            for task in tasks:
                task.cancel()
            runner.run(session.close())


async def _opened(aiohttp: Any, fetching: Fetching) -> Any:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=fetching.seconds),
        headers=_HEADERS,
        connector=aiohttp.TCPConnector(limit=fetching.connections),
        # A compressed answer could be a bomb: it stays as it is, and is no image then.
        auto_decompress=False,
        trust_env=True,
    )


async def _result(task: asyncio.Task[bytes | str]) -> bytes | str:
    return await task


async def _fetch(
    session: Any, url: str, fetching: Fetching, gate: asyncio.Semaphore
) -> bytes | str:
    """One image, tried again after transient faults; or the last reason."""
    reason = ""
    for attempt in range(fetching.retry.retries + 1):
        if attempt:
            await asyncio.sleep(min(fetching.retry.seconds * 2 ** (attempt - 1), 30.0))
        try:
            async with gate:
                return await _get(session, url, fetching.largest_bytes)
        except _Refused as error:
            return str(error)
        except (OSError, ValueError, _client_error()) as error:
            reason = reason_of(error)
            if not is_transient(error):
                break
    return reason


def _client_error() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError


async def _get(session: Any, url: str, largest: int) -> bytes:
    async with session.get(url, max_redirects=5) as answer:
        answer.raise_for_status()
        data = bytearray()
        async for piece in answer.content.iter_chunked(_PIECE):
            data += piece
            if len(data) > largest:
                raise _Refused(f"larger than {largest / 2**20:.0f} MiB")
        return bytes(data)
