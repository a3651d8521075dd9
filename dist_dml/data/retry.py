"""Try again what may work in a moment, give up on what will not, and never wait for ever."""

from __future__ import annotations

import errno
import itertools
import os
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from dist_dml.credentials import redact
from dist_dml.data.faults import StorageFault
from dist_dml.keyed_random import generator, key_of

T = TypeVar("T")
_LONGEST_PAUSE = 30.0

_AGAIN = frozenset(
    (
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE, errno.ENOBUFS),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTUNREACH),
        *(errno.EHOSTDOWN, getattr(errno, "EREMOTEIO", errno.EIO)),
    )
)
"""s3fs states a 503 as EBUSY and a 500 as EREMOTEIO; ESTALE is NFS's for a handle it lost."""
_AGAIN_BY_NAME = {
    "aiohttp": {"ClientConnectionError", "ClientPayloadError"},
    "botocore": {"HTTPClientError", "IncompleteReadError", "ResponseStreamingError"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError"},
    "google": {"TransportError"},
    "gcsfs": {"ChecksumError"},
}
"""Exceptions of the clients, by their package: none of them is imported for asking."""
_CLIENTS = frozenset({*_AGAIN_BY_NAME, "fsspec", "s3fs", "urllib3", "azure", "adlfs", "paramiko"})
_NOT_IMPLEMENTED = (501, 505)


class Interrupted(Exception):
    """Whoever asked for the bytes does not want them any more."""


class ShortAnswer(Exception):
    """Fewer bytes came than were asked for; the rest may come the next time."""


@dataclass(frozen=True)
class Retry:
    """How often something is tried again, and how long the first pause is. Picklable.

    Attributes:
        retries: further attempts after the first one.
        seconds: pause before the first of them; each next one is twice as long, up to 30 s.
    """

    retries: int
    seconds: float

    def run(
        self,
        what: str,
        call: Callable[[], T],
        names_may_return: bool = False,
        stop: threading.Event | None = None,
    ) -> T:
        """`call()`, again after transient faults: timeouts, lost connections, HTTP 429 and 5xx.

        Every `call` brings its own timeout; the pauses add up to `pauses()`. Prints a line at the
        first retry and at each tenth.

        Args:
            what: named in messages; secrets in URLs are left out.
            call: reads or asks something, and may be repeated.
            names_may_return: a missing file is transient too: network file systems lose names for
                a moment. An object store that says 404 means it.
            stop: ends the pauses early.

        Raises:
            StorageFault: what failed, how often, for how long, and the last reason.
            Interrupted: `stop` was set.
        """
        started = time.monotonic()
        for attempt in itertools.count():
            try:
                return call()
            except Exception as error:
                if not _is_storage_error(error):
                    raise
                reason = reason_of(error)
                if not is_transient(error, names_may_return):
                    raise StorageFault(f"{hide_secrets(what)}: {reason}") from None
            if attempt == self.retries:
                seconds = time.monotonic() - started
                raise StorageFault(
                    f"{hide_secrets(what)}: failed {attempt + 1} times in {seconds:.1f} s, at last "
                    f"because of: {reason}; raise data.storage.retries or "
                    "data.storage.retry_seconds to wait longer"
                )
            self._pause(what, reason, attempt, stop)
        raise AssertionError("the loop ends by return or error")

    def pauses(self) -> float:
        """Seconds that all pauses together take at most."""
        return sum(min(self.seconds * 2**i, _LONGEST_PAUSE) for i in range(self.retries))

    def _pause(self, what: str, reason: str, attempt: int, stop: threading.Event | None) -> None:
        # Up to a quarter shorter, by process: those that failed together do not return together.
        draw = generator(key_of(os.getpid(), what, attempt)).random()
        seconds = min(self.seconds * 2**attempt, _LONGEST_PAUSE) * (1 - draw / 4)
        _warn(what, reason, seconds)
        if stop is None:
            time.sleep(seconds)
        elif stop.wait(seconds):
            raise Interrupted


_warnings: dict[str, int] = {}
"""Retries of this process, by what was tried: a shard of a shaky server would fill the log."""


def _warn(what: str, reason: str, seconds: float) -> None:
    count = _warnings[what] = _warnings.get(what, 0) + 1
    if count == 1 or count % 10 == 0:
        # In one piece: several threads and processes write here.
        sys.stderr.write(
            f"dist_dml: warning: {hide_secrets(what)}: {reason}; trying again in {seconds:.1f} s "
            f"(retry {count})\n"
        )
        sys.stderr.flush()


def is_transient(error: BaseException, names_may_return: bool = False) -> bool:
    """Whether the same request may succeed in a moment.

    Clients wrap what happened: fsspec's HTTP turns *any* failure of `info` into a
    FileNotFoundError, whose cause is the 503. So the first of the chain that is clear decides.
    """
    for link in _chain(error):
        verdict = _verdict(link, names_may_return)
        if verdict is not None:
            return verdict
    return False


def _verdict(error: BaseException, names_may_return: bool) -> bool | None:
    status = _http_status(error)
    if status:
        return status in (408, 425, 429) or (status >= 500 and status not in _NOT_IMPLEMENTED)
    if isinstance(error, ssl.CertificateError):
        return False
    if isinstance(error, (ShortAnswer, TimeoutError, ConnectionError)):
        return True
    if isinstance(error, FileNotFoundError):
        # One without a number comes from a client, and only its cause tells why.
        return names_may_return if error.errno or names_may_return else None
    if isinstance(error, OSError) and error.errno in _AGAIN:
        return True
    if isinstance(error, PermissionError):
        return False
    names = _AGAIN_BY_NAME.get(_package(error), set())
    if not isinstance(error, ssl.SSLError) and any(
        kind.__name__ in names for kind in type(error).__mro__
    ):
        return True
    return None


def _http_status(error: BaseException) -> int:
    """The status of an HTTP answer, as aiohttp, botocore or gcsfs hold it; 0 if it has none."""
    package = _package(error)
    status = None
    if package == "aiohttp":
        status = getattr(error, "status", None)
    elif package == "botocore":
        answer = getattr(error, "response", None) or {}
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif package == "gcsfs":
        status = getattr(error, "code", None)
    text = str(status)
    return int(text) if text.isdigit() else 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


def _is_storage_error(error: Exception) -> bool:
    """Whether an exception speaks of the storage; a bug keeps its traceback."""
    if isinstance(error, (OSError, ShortAnswer)):
        return True
    return _package(error) in _CLIENTS


def reason_of(error: BaseException) -> str:
    """Why a request failed, in one line without secrets."""
    for link in _chain(error):
        status = _http_status(link)
        if status:
            words = getattr(link, "message", "") if _package(link) == "aiohttp" else ""
            return f"HTTP {status}" + (f" ({hide_secrets(str(words))})" if words else "")
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        return hide_secrets(error.strerror)
    text = hide_secrets(str(error)).strip()
    if isinstance(error, TimeoutError):
        return text or "no answer in time"
    first = text.splitlines()[0] if text else ""
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return first or type(error).__name__


def hide_secrets(text: str) -> str:
    """`text` with its URLs shown as `plain_urls` does, and without what `expand` has looked up."""
    return redact(plain_urls(text))


def plain_urls(text: str) -> str:
    """`text` with its URLs as scheme, host and path: without passwords and signatures."""
    return re.sub(
        r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/'\"]*@)?([^\s?#'\"]*)[^\s'\"]*", r"\1\2", text
    )
