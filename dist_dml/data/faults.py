"""What can go wrong with a sample, and what with the storage: one is replaced, the other is not."""

from __future__ import annotations

from typing import Literal

BadKind = Literal["checksum", "cut_short", "not_an_image", "too_large", "undecodable"]
"""Why a sample is bad; counted by these names."""


class BadSample(Exception):
    """One sample is damaged, for every reader and for ever: its bytes are there and are wrong.

    In training another of its class takes its place, in evaluation it is left out; both are
    counted.
    """

    def __init__(self, reason: str, kind: BadKind) -> None:
        super().__init__(reason, kind)
        self.reason: str = reason
        self.kind: BadKind = kind

    def __str__(self) -> str:
        return self.reason


class StorageFault(Exception):
    """The storage did not give the bytes: tried again for a while, then the run ends.

    Never replaced: else what is trained on would depend on the network.
    """
