"""Random numbers that depend on what they are for, never on which worker draws them.

Every draw starts from a 64-bit key made of (seed, purpose, step, position or class id). Two layouts
of workers that process the same row, or hold the same class, therefore draw the same numbers.
The mixer is SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), in wrapping 64-bit
arithmetic.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits, as torch has no uint64 arithmetic."""
    return value - 2**64 if value >= 2**63 else value


def key_of(seed: int, purpose: str, *numbers: int) -> int:
    """A 64-bit key in 0..2^64-1 from a seed, a purpose ("augment", "dropout") and further numbers.

    The same on every machine and in every process: nothing depends on Python's `hash`.
    """
    state = seed & _MASK
    for number in (zlib.crc32(purpose.encode()), *numbers):
        state = _mix((state ^ (number & _MASK)) + _GOLDEN & _MASK)
    return state


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def generator(key: int) -> np.random.Generator:
    """A NumPy generator (Philox, counter based) of the stream that belongs to `key`."""
    return np.random.Generator(np.random.Philox(key=key))


def _mix_tensor(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """`_mix` on int64 tensors: `>>` is arithmetic there, so the copied sign bits are masked off."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_MIX_1)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_MIX_2)
    return x ^ ((x >> 31) & (2**33 - 1))


def row_keys(key: int, positions: Int[Tensor, " r"]) -> Int[Tensor, " r"]:
    """One int64 key a row from a key (see `key_of`) and the rows' positions in the global batch."""
    return _mix_tensor((positions ^ _signed(key)) + _signed(_GOLDEN))


def keyed_uniform(keys: Int[Tensor, " r"], count: int, salt: int = 0) -> Float[Tensor, "r n"]:
    """`count` uniform float32 numbers in [0, 1) for each key; row i depends on keys[i] alone.

    Args:
        keys: int64, on any device.
        count: numbers a row.
        salt: tells apart the layers that share the row's key.
    """
    columns = torch.arange(count, device=keys.device) * _signed(_GOLDEN) + _signed(
        key_of(salt, "salt")
    )
    bits = _mix_tensor(keys[:, None] ^ _mix_tensor(columns)[None, :])
    return ((bits >> 40) & (2**24 - 1)).to(torch.float32) * 2.0**-24


def keyed_normal(keys: Int[Tensor, " r"], count: int) -> Float[Tensor, "r n"]:
    """`count` standard normal float32 numbers for each key (Box-Muller)."""
    radius = torch.sqrt(-2.0 * torch.log1p(-keyed_uniform(keys, count, salt=1)))
    return radius * torch.cos(2.0 * torch.pi * keyed_uniform(keys, count, salt=2))
