"""Secrets stay outside: `${NAME}` stands for them until they are used, and no text shows them.

A configuration is stored, hashed, printed, uploaded and kept in checkpoints. So it may name an
environment variable where a password or a token belongs, `http://ann:${MLFLOW_PASSWORD}@host`, and
only `expand` at the point of use knows the value. What holds a secret itself is refused.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

from dist_dml.errors import UsageError

EXPANDED_KEYS = frozenset(("tracking.mlflow_uri", "data.path", "data.mixture.path"))
"""Keys whose values may hold `${NAME}`; items of a list have the key of the list."""

HIDDEN = "***"
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_REFERENCES_ONLY = re.compile(r"(?:\$\{[A-Za-z_][A-Za-z0-9_]*\})+")
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_USERINFO = re.compile(
    rf"(?P<scheme>{_SCHEME})"
    # Up to the last @ before the path; in the URIs of databases a password may hold a slash.
    r"(?P<userinfo>[^\s/?#'\"<>]*|(?<!http://)(?<!https://)[^\s/:@'\"<>]*:[^\s@'\"<>]*)@"
)
_PARAMETER = re.compile(
    r"(?P<start>[?&;](?P<name>[\w.-]*(?:token|signature|password|passwd|secret)"
    r"|sig|pwd|key|odbc_connect|[\w.-]*api[_-]?key)=)(?P<value>[^\s&;#'\"<>]+)",
    re.IGNORECASE,
)
_LONG_USER = 16
"""A user name of this length without a password is a token: several services take it there."""
_LEAST_VALUE = 4
"""Shorter values are in every text; who has such a password has none."""
_KNOWN_SECRETS = (
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"),
)
"""Variables that libraries read by themselves, so that `expand` never sees them."""

_shown_as: dict[str, str] = {}
"""What stands for each expanded value, and for its other spellings, in texts."""
_lock = threading.Lock()


def expand(text: str, key: str) -> str:
    """`text` with each `${NAME}` replaced by the environment's value, which `redact` then knows.

    Args:
        text: as the configuration has it.
        key: where it stands, for the message.

    Raises:
        UsageError: a variable is not set or empty, or `${` begins no name.
    """
    missing = [name for name in _REFERENCE.findall(text) if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"{key}={redact(text)} asks for the environment variable {missing[0]}, which is not "
            f"set; export {missing[0]} where this program runs, on every machine"
        )
    if "${" in _REFERENCE.sub("", text):
        raise UsageError(
            f"{key}={redact(text)}: `${{` begins no name of an environment variable; expected "
            "${NAME} of letters, digits and _"
        )
    names = dict.fromkeys(_REFERENCE.findall(text))
    if not names:
        return text
    whole = _REFERENCE.sub(lambda found: os.environ[found[1]], text)
    for name in names:
        _remember(os.environ[name], f"${{{name}}}")
    for expanded in (whole, *(os.environ[name] for name in names)):
        for part in _secret_parts(expanded):
            _remember(part, HIDDEN)
    return whole


def find_secret(text: str) -> str:
    """What in a text is a secret, in words that do not repeat it; "" where nothing is.

    >>> find_secret("http://ann:hunter2@host"), find_secret("http://ann:${PASSWORD}@host")
    ('a password', '')
    """
    for spelling in dict.fromkeys((text, unquote(text))):
        for found in _USERINFO.finditer(spelling):
            user, colon, password = found["userinfo"].partition(":")
            if colon and password and not _REFERENCES_ONLY.fullmatch(password):
                return "a password"
            if not colon and len(user) >= _LONG_USER and not _REFERENCES_ONLY.fullmatch(user):
                return "a token in the place of the user"
        for found in _PARAMETER.finditer(spelling):
            if not _REFERENCES_ONLY.fullmatch(found["value"]):
                return f"a secret behind {found['name']}="
    return ""


def refuse_secret(text: str, key: str) -> None:
    """Refuse a text that holds a secret itself.

    Raises:
        UsageError: names the key and what to write instead, not the secret.
    """
    if secret := find_secret(text):
        raise UsageError(
            f"{key} holds {secret}, which would be written to disk, to MLflow and to checkpoints; "
            "put it into an environment variable and write ${NAME} in its place (in a shell within "
            "single quotes)"
        )


def check_values(value: Any, key: str = "") -> None:
    """Refuse a configuration with a secret in it, or with `${NAME}` where nothing expands it.

    Args:
        value: nested mappings and lists, as read; of any other type nothing is asked.
        key: dotted key of `value`.

    Raises:
        UsageError: names the key.
    """
    if isinstance(value, Mapping):
        for name, inside in value.items():
            check_values(inside, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for inside in value:
            check_values(inside, key)
    elif isinstance(value, str):
        refuse_secret(value, key)
        if _REFERENCE.search(value) and key not in EXPANDED_KEYS:
            raise UsageError(
                f"{key}={value!r}: ${{NAME}} is expanded in {', '.join(sorted(EXPANDED_KEYS))} "
                "only; write the value itself"
            )


def redact(text: str) -> str:
    """`text` without secrets: passwords and tokens of URLs, and every value that was expanded.

    Expanded values become `${NAME}` again, all others `***`.
    """
    known = dict(_shown_as)
    for name in _KNOWN_SECRETS:
        if len(value := os.environ.get(name, "")) >= _LEAST_VALUE:
            known.setdefault(value, f"${{{name}}}")
    if known:
        # The longest first: a value may hold another one.
        longest = sorted(known, key=len, reverse=True)
        text = re.sub("|".join(map(re.escape, longest)), lambda found: known[found[0]], text)
    return _PARAMETER.sub(_without_value, _USERINFO.sub(_without_password, text))


def _without_password(found: re.Match[str]) -> str:
    user, colon, password = found["userinfo"].partition(":")
    if colon:
        shown = password if _REFERENCES_ONLY.fullmatch(password) else HIDDEN
        return f"{found['scheme']}{user}:{shown}@" if password else found[0]
    if len(user) >= _LONG_USER and not _REFERENCES_ONLY.fullmatch(user):
        return f"{found['scheme']}{HIDDEN}@"
    return found[0]


def _without_value(found: re.Match[str]) -> str:
    kept = _REFERENCES_ONLY.fullmatch(found["value"]) is not None
    return found[0] if kept else f"{found['start']}{HIDDEN}"


def _secret_parts(text: str) -> list[str]:
    """The secrets in an expanded text, as libraries may print them without what is around them."""
    parts = []
    for found in _USERINFO.finditer(text):
        userinfo = unquote(found["userinfo"])
        user, colon, password = userinfo.partition(":")
        parts += [password, base64.b64encode(userinfo.encode()).decode()] if colon else []
        parts += [user] if not colon and len(user) >= _LONG_USER else []
    return parts + [found["value"] for found in _PARAMETER.finditer(text)]


def _remember(value: str, shown: str) -> None:
    """Have `redact` replace a value, also where it was quoted for a URL or as JSON."""
    spellings = (value, quote(value, safe=""), unquote(value), json.dumps(value)[1:-1])
    with _lock:
        for spelling in map(str.strip, spellings):
            if len(spelling) >= _LEAST_VALUE:
                _shown_as.setdefault(spelling, shown)


def print_traceback(error: BaseException) -> None:
    """`traceback.print_exception`, redacted: messages of libraries hold whole URLs."""
    sys.stderr.write(redact("".join(traceback.format_exception(error))))
    sys.stderr.flush()


def redact_tracebacks() -> None:
    """Redact what Python prints of an error that nobody catches, in any thread."""

    def hook(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        print_traceback(error.with_traceback(at))

    def thread_hook(given: threading.ExceptHookArgs) -> None:
        if given.exc_value is not None and not isinstance(given.exc_value, SystemExit):
            print_traceback(given.exc_value)

    # Whoever has set one of them, a test's runner for example, keeps it.
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = hook
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = thread_hook


class RedactedStream:
    """A text stream that redacts each piece before it goes on; for what a library prints itself."""

    def __init__(self, stream: Any) -> None:
        """`stream`: any text stream; all but `write` is its own."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without its secrets."""
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
