"""What may work in a moment is tried again, everything else is said at once, nothing for ever."""

from __future__ import annotations

import errno
import os
import ssl
import threading
import time

import aiohttp
import pytest
from shard_server import within

from dist_dml.data.faults import BadSample, StorageFault
from dist_dml.data.retry import (
    Interrupted,
    Retry,
    ShortAnswer,
    hide_secrets,
    is_transient,
    reason_of,
)

QUICK = Retry(3, 0.001)


class Calls:
    """Raises its errors one after the other, then returns 7."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.count = list(errors), 0

    def __call__(self) -> int:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


class Recorder(threading.Event):
    """Notes how long it was waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout or 0.0)
        return False


def http(status: int) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(None, (), status=status, message="words")  # type: ignore


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def test_a_transient_fault_is_tried_again_and_told_once(capsys):
    call = Calls(ConnectionResetError("lost"), TimeoutError(), http(503))
    assert QUICK.run("shard a", call) == 7
    assert call.count == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["dist_dml: warning: shard a: lost; trying again in 0.0 s (retry 1)"]


def test_each_tenth_retry_is_told(capsys):
    Retry(25, 0.0).run("shard told", Calls(*[ConnectionResetError("lost")] * 25))
    told = [line[-9:-1] for line in capsys.readouterr().err.splitlines()]
    assert told == ["(retry 1", "retry 10", "retry 20"]


def test_after_the_retries_the_fault_says_what_how_often_how_long_and_why():
    with pytest.raises(StorageFault, match=r"^shard b: failed 4 times in 0\.\d s.*HTTP 503 \(wo"):
        QUICK.run("shard b", Calls(*[http(503)] * 4))


@pytest.mark.parametrize("error", [http(403), http(404), PermissionError(errno.EACCES, "no")])
def test_what_is_permanent_is_tried_once(error):
    call = Calls(error)
    with pytest.raises(StorageFault):
        QUICK.run("x", call)
    assert call.count == 1


@pytest.mark.parametrize("error", [TypeError("a bug"), BadSample("torn", "cut_short")])
def test_what_is_no_storage_fault_passes_unchanged(error):
    call = Calls(error)
    with pytest.raises(type(error)) as caught:
        QUICK.run("x", call)
    assert caught.value is error
    assert call.count == 1


def test_pauses_double_up_to_thirty_seconds_and_differ_by_process():
    stop = Recorder()
    retry = Retry(9, 0.5)
    with pytest.raises(StorageFault):
        retry.run("x", Calls(*[TimeoutError()] * 10), stop=stop)
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert retry.pauses() == sum(longest)
    shares = [pause / most for pause, most in zip(stop.pauses, longest, strict=True)]
    assert all(0.75 <= share <= 1 for share in shares)
    assert len(set(shares)) == len(shares)


def test_a_stop_ends_a_pause():
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        within(5, lambda: Retry(3, 30.0).run("x", Calls(TimeoutError()), stop=stop))
    assert time.monotonic() - started < 4


def test_a_local_name_may_return_and_an_object_may_not():
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    assert QUICK.run("x", Calls(missing), names_may_return=True) == 7
    with pytest.raises(StorageFault, match="No such file"):
        QUICK.run("x", Calls(missing))


@pytest.mark.parametrize(
    ("error", "again"),
    [
        *[(http(status), True) for status in (408, 425, 429, 500, 502, 503, 504)],
        *[(http(status), False) for status in (400, 401, 403, 404, 410, 416, 501)],
        *[(OSError(n, "x"), True) for n in (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY)],
        *[(OSError(n, "x"), False) for n in (errno.EACCES, errno.EISDIR, errno.ENOSPC)],
        (ShortAnswer("x"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError("x"), True),
        (aiohttp.InvalidURL("x"), False),
        (ssl.SSLCertVerificationError("self-signed"), False),
        # fsspec's HTTP says that a file is missing, whatever happened.
        (caused(FileNotFoundError("u"), http(503)), True),
        (caused(FileNotFoundError("u"), http(404)), False),
        (caused(FileNotFoundError("u"), aiohttp.ServerDisconnectedError()), True),
        (FileNotFoundError("u"), False),
        # s3fs says EBUSY of a 503, and PermissionError without a number of a 403.
        (PermissionError("AccessDenied"), False),
    ],
)
def test_which_faults_may_pass(error, again):
    assert is_transient(error) is again


def test_a_certificate_that_is_refused_is_not_asked_for_again():
    key = aiohttp.client_reqrep.ConnectionKey("h", 443, True, True, None, None, None)
    refused = ssl.SSLCertVerificationError("self-signed")
    assert not is_transient(aiohttp.ClientConnectorCertificateError(key, refused))  # type: ignore


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/a.tar?sig=1#x", "https://host/a.tar"),
        ("s3://bucket/a.tar?versionId=3", "s3://bucket/a.tar"),
        ("404, url='http://u:p@h:80/b?X-Amz-Signature=f' end", "404, url='http://h:80/b' end"),
        ("http://h/a@b.tar", "http://h/a@b.tar"),
        ("no url: a?b@c", "no url: a?b@c"),
    ],
)
def test_secrets_in_urls_are_never_shown(text, shown):
    assert hide_secrets(text) == shown


def test_reasons_are_one_line():
    assert reason_of(http(503)) == "HTTP 503 (words)"
    assert reason_of(TimeoutError()) == "no answer in time"
    assert reason_of(OSError(errno.EIO, "Input/output error", "/x")) == "Input/output error"
    assert reason_of(ShortAnswer("one\ntwo")) == "one"
