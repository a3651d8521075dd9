"""A mixture: several data sets in one order, each with its share of the draws."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64

from dist_dml.data.orders import Order, Window, counted


class _Dealt(NamedTuple):
    """Whose turn it is at some draws.

    Attributes:
        part: of each draw.
        turn: how many of the part's own draws came before it.
        before: draws of each part before the first of these.
    """

    part: Int64[np.ndarray, " d"]
    turn: Int64[np.ndarray, " d"]
    before: Int64[np.ndarray, " k"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Draws from several orders by weight, counted over the whole run.

    The j-th draw of a part with share w of the weights is due at time (j + 1/2) / w, and the draws
    of all parts are taken as they fall due, the earlier part first where two are due together: the
    divisor method of Webster and Sainte-Lague, which has no memory either, since draw t can be
    found from t alone. With k parts, after any number t of draws a part has had t w of them to
    within 1/2 + w k / 2, hence a batch of B rows holds B w to within 1 + w k, also each micro-batch
    and each worker's slice of it, and in the long run the shares are exact.

    A part runs through its own order, one *pass* after the other (a pass of a part is what an epoch
    is without a mixture: each of its samples once, if it is not repeated), whatever the epochs of
    the mixture do. An epoch is as many draws as all parts have together: the steps are those of one
    data set of that size; `drop_last` passes over the draws of the short batch that it leaves out.
    A mixture of one part is that part.

    Attributes:
        orders: of each part.
        rows: the positions of each part's samples among all; 4 bytes each are enough.
        weights: shares of the parts, of any sum.
    """

    orders: tuple[Order, ...]
    rows: tuple[Int[np.ndarray, " _"], ...]
    weights: tuple[float, ...]

    @cached_property
    def _shares(self) -> Float64[np.ndarray, " k"]:
        weights = np.array(self.weights, np.float64)
        return weights / weights.sum()

    @property
    def num_draws(self) -> int:
        """See `dist_dml.data.orders.Order`."""
        return sum(order.num_draws for order in self.orders)

    def _deal(self, first: int, stop: int) -> _Dealt:
        """The draws `first` .. `stop` - 1 of the run. O(stop - first + k).

        Of the time x at which t draws have fallen due, the parts have had w x each, rounded: |x -
        t| <= k / 2. So all that is due before first - k comes before `first`, and all of `stop` is
        due before stop + k.
        """
        shares, number = self._shares, len(self.weights)
        before = np.floor(shares * max(first - number, 0) - 0.5).astype(np.int64) - 1
        before = np.maximum(before, 0)
        lengths = np.ceil(shares * (stop + number) + 0.5).astype(np.int64) + 1 - before
        part = np.repeat(np.arange(number), lengths)
        turn = counted(lengths) + before[part]
        order = np.lexsort((part, (turn + 0.5) / shares[part]))
        earlier = first - int(before.sum())
        assert 0 <= earlier <= len(order) - (stop - first), "too few draws are due"
        before = before + np.bincount(part[order[:earlier]], minlength=number)
        chosen = order[earlier : earlier + stop - first]
        return _Dealt(part[chosen], turn[chosen], before)

    def take(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " d"]:
        """See `dist_dml.data.orders.Order`."""
        first = epoch * self.num_draws
        dealt = self._deal(first + start, first + stop)
        drawn = np.empty(stop - start, np.int64)
        for number, (order, rows) in enumerate(zip(self.orders, self.rows, strict=True)):
            mine = dealt.part == number
            begin = int(dealt.before[number])
            drawn[mine] = rows[_stream(order, begin, begin + int(mine.sum()))]
        return drawn

    def windows_from(self, draw: int) -> Iterator[Window]:
        """See `dist_dml.data.orders.Order`; those of all parts as they fall due."""
        before = self._deal(draw, draw).before.tolist()
        streams = [self._due_windows(number, begin) for number, begin in enumerate(before)]
        return heapq.merge(*streams, key=lambda window: window[0])

    def _due_windows(self, number: int, begin: int) -> Iterator[Window]:
        """The windows of one part with the mixture's draws at which they begin, or k earlier."""
        for first, shards in self.orders[number].windows_from(begin):
            yield int((first + 0.5) / self._shares[number]) - len(self.weights), shards

    def identity(self) -> dict[str, Any]:
        """See `dist_dml.data.orders.Order`."""
        parts = [order.identity() for order in self.orders]
        shares = [float(share) for share in self._shares]
        return {"weights": shares, **_merged(parts)}


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What all parts have in common as it is; otherwise a list with an entry for each part."""
    merged = {}
    for key in {key: None for part in parts for key in part}:
        values = [part.get(key) for part in parts]
        merged[key] = values[0] if all(value == values[0] for value in values) else values
    return merged


def _stream(order: Order, first: int, stop: int) -> Int64[np.ndarray, " d"]:
    """The draws `first` .. `stop` - 1 of an order whose passes follow each other."""
    drawn = np.empty(stop - first, np.int64)
    done = first
    while done < stop:
        number, start = divmod(done, order.num_draws)
        end = min(stop, (number + 1) * order.num_draws)
        drawn[done - first : end - first] = order.take(
            number, start, end - number * order.num_draws
        )
        done = end
    return drawn
