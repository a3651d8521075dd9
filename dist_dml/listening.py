"""Where a server of ours listens, and by which names it may be asked.

A server that asks for no password listens to this machine alone unless told otherwise, and answers
only to names that it knows: a web page can point a name of its own at this machine (DNS rebinding),
and a browser then sends that name.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dist_dml.errors import UsageError

HOST = "127.0.0.1"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; of names, localhost alone counts."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bracketed(host: str) -> str:
    """The address as it stands in a URL."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def spellings(name: str, port: int) -> list[str]:
    """What browsers send for a name: with the port, or without one behind a proxy."""
    has_port = name.rpartition(":")[2].isdigit() and not name.endswith("]")
    return [name] if has_port else [f"{name}:{port}", name]


def check_names(host: str, allowed_hosts: Sequence[str], example: str) -> None:
    """Refuse to let other machines in without names, or under any name.

    Raises:
        UsageError: names the option.
    """
    if not is_loopback(host) and not allowed_hosts:
        raise UsageError(
            f"--host={host} lets other machines in; name with --allowed-hosts by which names "
            f"browsers reach it, for example --allowed-hosts {example}"
        )
    for name in allowed_hosts:
        if not name.strip("*?:.[]"):
            raise UsageError(
                f"--allowed-hosts={name} allows any name, and with it any web page that points a "
                "name of its own here; list the names"
            )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one (`getsockname` tells which).

    Raises:
        UsageError: the port or the address cannot be used.
    """
    if not 0 <= port < 2**16:  # Some resolvers take it modulo 65,536.
        raise UsageError(f"port {port} of {host} cannot be used; give one of 0..65535 with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"port {port} of {host} cannot be used ({error}); give another with --port or --host"
        ) from None
    return listener


def name_filter(allowed_hosts: Sequence[str], port: int) -> Callable[[str], bool]:
    """Whether a `Host` header is one of ours: a loopback's name with any port, or a name listed."""
    listed = {text.lower() for name in allowed_hosts for text in spellings(name, port)}

    def is_ours(header: str) -> bool:
        text = header.strip().lower()
        name, separator, number = text.rpartition(":")
        if separator and number.isascii() and number.isdecimal():
            return name in _LOOPBACK_NAMES or text in listed
        return text in _LOOPBACK_NAMES or text in listed

    return is_ours


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within, SIGTERM raises `KeyboardInterrupt`, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
