"""Orders: which samples an epoch draws, one after the other. Pure functions of their fields.

An order knows nothing of batches: `dist_dml.data.plan` cuts it. Samples are *positions* 0..n-1 in
the list of samples that are trained on. Everything is vectorised and in the smallest whole numbers
that can count the samples: 4 bytes for each of up to 2^31.

What an epoch costs, measured on one of two shared cores in November 2026 at n = 10^7 (10^6
classes), and ten times as much (the first line measured, the others computed):

| order | first batch of an epoch | kept | at most | at 10^8 |
|---|---|---|---|---|
| shuffled | 0.45 s | 40 MB | 40 MB | 8 s, 0.4 GB |
| with repeats, 1.1 x 10^7 draws | 1.5 s | 130 MB | 340 MB | 15 s, 1.3 to 3.4 GB |
| balanced, 64 x 4 | 1 s | 170 MB | 270 MB | 10 s, 1.6 to 2.7 GB |
| windows of 80,000 samples | 3.5 ms a window | 0.3 MB | 2 MB | the same |
| sequential | nothing | nothing | nothing | the same |

The 2,500,000 images of 10^6 classes of the synthetic data set: 0.2 s an epoch in balanced batches.
A batch of 256 then takes 1 us (balanced: 170).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Int8, Int32, Int64

from dist_dml.keyed_random import generator, key_of

T = TypeVar("T")
Window = tuple[int, Int64[np.ndarray, " s"]]
"""The draw, counted over the whole run, with which a window begins, and its shards' codes."""


@dataclass(frozen=True, eq=False)
class SplitColumns:
    """What an order may depend on. One entry for each of the `n` samples that are trained on.

    Attributes:
        class_id: its class.
        shard: code of its shard.
        part: number of its data set in a mixture; 0 is `data.path`.
    """

    class_id: Int64[np.ndarray, " n"]
    shard: Int32[np.ndarray, " n"]
    part: Int8[np.ndarray, " n"]


@runtime_checkable
class Order(Protocol):
    """What a plan needs of an order."""

    @property
    def num_draws(self) -> int:
        """Samples that every epoch draws, repetitions counted."""
        ...

    def take(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " d"]:
        """Positions of the draws `start` .. `stop` - 1 of an epoch."""
        ...

    def windows_from(self, draw: int) -> Iterator[Window]:
        """The windows of shards from the one that holds draw `draw` (of the whole run) on, without
        an end; nothing where any sample may follow any other."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the order depends on besides seed and samples; only what is not the default."""
        ...


class Kept(Generic[T]):
    """The last value of a costly function of one argument.

    `lru_cache` makes the next value before it drops the last one: two permutations at a time.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._last: tuple[Hashable, T] | None = None

    def __call__(self, argument: Hashable) -> T:
        last = self._last
        if last is None or last[0] != argument:
            self._last = last = None
            self._last = last = (argument, self._make(argument))
        return last[1]


@dataclass(frozen=True, eq=False)
class Groups:
    """The positions 0..n-1 by a value of theirs, such as their class.

    Attributes:
        codes: the distinct values, ascending.
        starts: group i holds the places starts[i] .. starts[i + 1] - 1 of the grouped positions.
        rows: the grouped positions, ascending within a group; None if that is 0, 1, 2, ...
    """

    codes: Int[np.ndarray, " g"]
    starts: Int64[np.ndarray, " g+1"]
    rows: Int[np.ndarray, " n"] | None

    @cached_property
    def sizes(self) -> Int64[np.ndarray, " g"]:
        """Positions of each group."""
        return np.diff(self.starts)

    @property
    def num_rows(self) -> int:
        """All positions."""
        return int(self.starts[-1])

    def at(self, places: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
        """The positions at these places of the grouped order."""
        return places if self.rows is None else self.rows[places]


def group_rows(values: Int[np.ndarray, " n"]) -> Groups:
    """Group the positions of a column of whole numbers, 0 at least, by its values.

    Sorts (value, position) packed into 64 bits: 4 times as fast as a stable argsort, and needs 16
    bytes a row meanwhile. Costs a comparison a row where the column ascends already, as the shards
    of an index do.
    """
    assert len(values) > 0, "there is nothing to group"
    if np.all(values[1:] >= values[:-1]):
        rows, ordered = None, values
    else:
        bits = len(values).bit_length()
        assert values.min() >= 0
        assert int(values.max()).bit_length() + bits <= 64
        packed = values.astype(np.uint64)
        packed <<= np.uint64(bits)
        packed |= np.arange(len(values), dtype=np.uint64)
        packed.sort()
        rows = (packed & np.uint64(2**bits - 1)).astype(position_type(len(values)))
        ordered = (packed >> np.uint64(bits)).astype(np.int64)
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.concatenate([[0], changes, [len(values)]]).astype(np.int64)
    return Groups(np.asarray(ordered[starts[:-1]]), starts, rows)


def position_type(count: int) -> type[np.signedinteger]:
    """The dtype that counts up to `count` samples."""
    return np.int32 if count < 2**31 else np.int64


def cuts(total: int, pieces: int) -> list[int]:
    """Bounds of `pieces` contiguous parts of `total` things, the larger parts first."""
    quotient, rest = divmod(total, pieces)
    return [i * quotient + min(i, rest) for i in range(pieces + 1)]


def counted(lengths: Int64[np.ndarray, " g"]) -> Int64[np.ndarray, " n"]:
    """0, 1, .., lengths[0] - 1, then 0, 1, .., lengths[1] - 1, and so on."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


@dataclass(frozen=True)
class SequentialOrder:
    """All samples by their position, every epoch alike."""

    num_draws: int

    def take(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " d"]:
        """See `Order`."""
        return np.arange(start, stop)

    def windows_from(self, draw: int) -> Iterator[Window]:
        """None: see `dist_dml.data.windows` for one that knows its shards."""
        return iter(())

    def identity(self) -> dict[str, Any]:
        """See `Order`."""
        return {"order": "sequential"}


@dataclass(frozen=True, eq=False)
class ShuffledOrder:
    """All samples once an epoch, in a permutation drawn from (seed, epoch)."""

    num_draws: int
    seed: int

    @cached_property
    def _permutation(self) -> Kept[Int[np.ndarray, " n"]]:
        return Kept(self._permute)

    def _permute(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Equal to `generator(...).permutation(n)`, in half its memory."""
        order = np.arange(self.num_draws, dtype=position_type(self.num_draws))
        generator(key_of(self.seed, "plan", epoch)).shuffle(order)
        return order

    def take(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " d"]:
        """See `Order`."""
        return self._permutation(epoch)[start:stop].astype(np.int64)

    def windows_from(self, draw: int) -> Iterator[Window]:
        """None: any sample may follow any other."""
        return iter(())

    def identity(self) -> dict[str, Any]:
        """See `Order`."""
        return {}


@dataclass(frozen=True, eq=False)
class RepeatedOrder:
    """A permutation in which samples of rare classes come several times (Gupta, Dollar, Girshick,
    LVIS, CVPR 2019, section 5: repeat factor sampling).

    With f the share of a class among the n samples and t = `repeat_below`, its repeat factor is
    r = max(1, sqrt(t / f)). The paper draws the fraction of r at random; here every epoch has the
    same number of draws: a class of m samples gives D = max(m, round(sqrt(t n m))) (= r m), each of
    its samples floor(D / m) or ceil(D / m) of them. Those with one more rotate: over any number of
    epochs the draws of two samples of a class differ by at most one.

    Where no class is repeated, the permutation is that of `ShuffledOrder`.

    Attributes:
        classes: the samples by class.
        repeat_below: t.
        seed: of the permutations.
    """

    classes: Groups
    repeat_below: float
    seed: int

    @cached_property
    def _draws(self) -> Int64[np.ndarray, " g"]:
        """D of each class."""
        sizes = self.classes.sizes
        repeated = np.rint(np.sqrt(self.repeat_below * self.classes.num_rows * sizes))
        return np.maximum(sizes, repeated.astype(np.int64))

    @cached_property
    def _total(self) -> int:
        return int(self._draws.sum())

    @property
    def num_draws(self) -> int:
        """See `Order`."""
        return self._total

    @cached_property
    def _permutation(self) -> Kept[Int[np.ndarray, " d"]]:
        return Kept(self._permute)

    def _permute(self, epoch: int) -> Int[np.ndarray, " d"]:
        classes, total = self.classes, self.classes.num_rows
        each, more = np.divmod(self._draws, classes.sizes)
        counts = np.repeat(each.astype(np.int32), classes.sizes)
        owner = np.repeat(np.arange(len(more)), more)
        turn = (epoch * more[owner] + counted(more)) % classes.sizes[owner]
        counts[classes.starts[owner] + turn] += 1
        if classes.rows is not None:
            by_class, counts = counts, np.empty_like(counts)
            counts[classes.rows] = by_class
        order = np.repeat(np.arange(total, dtype=position_type(total)), counts)
        generator(key_of(self.seed, "plan", epoch)).shuffle(order)
        return order

    def take(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " d"]:
        """See `Order`."""
        return self._permutation(epoch)[start:stop].astype(np.int64)

    def windows_from(self, draw: int) -> Iterator[Window]:
        """None: any sample may follow any other."""
        return iter(())

    def identity(self) -> dict[str, Any]:
        """See `Order`."""
        return {"repeat_below": self.repeat_below}
