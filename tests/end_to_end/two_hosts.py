"""Two hosts that share storage and a link: network namespaces on one machine.

Each has an address of its own, sees nothing of the other but through the link, and loses it when
the link is cut. Needs root, or the right to make namespaces.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class NoNamespaces(Exception):
    """Why there are none."""


@dataclass(frozen=True)
class Host:
    """A namespace, the name of its end of the link, and its address."""

    namespace: str
    interface: str
    address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """`words`, run on this host."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def set_link(self, state: str) -> None:
        """`up` or `down`: the other host hears nothing more, and is not told so."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, gone after the block.

    Raises:
        NoNamespaces: this machine or user does not allow them, and why.
    """
    number = os.getpid() % 60000
    network = f"10.{200 + number // 3600 % 50}.{number // 200 % 200}"
    hosts = tuple(
        Host(f"dml{number}{name}", f"dml{number}{name}", f"{network}.{i}")
        for i, name in ((1, "a"), (2, "b"))
    )
    try:
        try:
            for host in hosts:
                _ip("netns", "add", host.namespace)
                _ip("-n", host.namespace, "link", "set", "lo", "up")
            one, other = hosts
            ends = ("type", "veth", "peer", "name", other.interface, "netns", other.namespace)
            _ip("link", "add", one.interface, "netns", one.namespace, *ends)
            for host in hosts:
                address = f"{host.address}/24"
                _ip("-n", host.namespace, "address", "add", address, "dev", host.interface)
                host.set_link("up")
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise NoNamespaces(f"network namespaces: {said.strip()}") from None
        yield one, other
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
