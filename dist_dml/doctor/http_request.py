"""One question to a web server, with a time limit and without leaking a password."""

from __future__ import annotations

import base64
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from urllib.parse import unquote, urlsplit

_MOST_BYTES = 64 * 1024


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0 where nothing came that is HTTP.
        body: at most 64 KiB of it, as text.
        seconds: from asking to the end of the answer.
        failure: in words, where there is no status.
        skew: seconds that the server's clock is ahead of this one; None if it does not say.
        headers: with names in lower case.
    """

    status: int
    body: str = ""
    seconds: float = 0.0
    failure: str = ""
    skew: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def ask(url: str, headers: Mapping[str, str], timeout_seconds: float) -> Answer:
    """GET a URL, through the proxy that the environment names. Never raises for what it meets.

    The headers given are sent to this server only, not where it redirects to.

    Args:
        url: without a user or a password.
        headers: to send.
        timeout_seconds: of the connection, and of each read.
    """
    request = urllib.request.Request(url)
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    asked, started = time.time(), time.perf_counter()
    try:
        try:
            answer = urllib.request.urlopen(request, timeout=timeout_seconds)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read(_MOST_BYTES).decode(errors="replace")
            seconds = time.perf_counter() - started
            given = {name.lower(): value for name, value in answer.headers.items()}
            skew = _skew(given.get("date", ""), asked, seconds)
            return Answer(int(answer.status or 0), body, seconds, "", skew, given)
    except (OSError, HTTPException, ValueError) as error:
        seconds = time.perf_counter() - started
        return Answer(0, "", seconds, _in_words(error, timeout_seconds))


def split_address(url: str) -> tuple[str, dict[str, str]]:
    """A URL without user and password, and the header that carries them.

    >>> split_address("http://ann:x@host:5000/mlflow/")
    ('http://host:5000/mlflow', {'Authorization': 'Basic YW5uOng='})
    """
    parts = urlsplit(url)
    userinfo, at, host = parts.netloc.rpartition("@")
    plain = parts._replace(netloc=host, query="", fragment="").geturl().rstrip("/")
    if not at:
        return plain, {}
    user, _, password = userinfo.partition(":")
    return plain, basic(unquote(user), unquote(password))


def basic(user: str, password: str) -> dict[str, str]:
    """The header of basic authentication."""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"}


def _skew(date: str, asked: float, seconds: float) -> float | None:
    """The server's clock against ours in the middle of the answer; `Date` has whole seconds."""
    try:
        there = parsedate_to_datetime(date).timestamp() + 0.5
    except (TypeError, ValueError):
        return None
    return there - (asked + seconds / 2)


def _in_words(error: Exception, timeout_seconds: float) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout_seconds:g} s"
    if isinstance(reason, socket.gaierror):
        return "its name has no address here"
    if isinstance(reason, ConnectionRefusedError):
        return "the connection is refused: nothing listens there"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({reason.verify_message})"
    if isinstance(reason, ssl.SSLError):
        return "it does not speak TLS (https)"
    text = str(reason) or type(reason).__name__
    return " ".join(text.split())[:160]
