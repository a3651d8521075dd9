"""The class-balanced order: every batch holds P classes with K samples each.

What an epoch covers. P = batch_size / samples_per_class; class c has n_c samples.

1. An epoch has S = ceil(sum_c ceil(n_c / K) / P) steps, each with exactly P classes, none twice,
   and exactly K draws of each of them (a *group*). Fewer than P classes are refused.
2. Class c has g_c = min(S, ceil(q n_c / K)) groups an epoch, where q >= 1 is the largest number of
   passes for which the P S groups of the epoch suffice. The groups that are then still to be
   given out go one each to classes with g_c < S, in turns over the epochs.
   Where no class is *cut* (point 4), ceil(n_c / K) groups, which cover a class once, leave fewer
   than P groups to fill the last batch with: the largest classes get them first.
3. The g_c K draws of a class are consecutive in a permutation of its samples that is repeated as
   often as needed. So in a group all samples differ if n_c >= K, and otherwise the uses of two of
   them differ by at most one. Within an epoch the uses of two samples of a class differ by at most
   one as well: they are floor or ceil of g_c K / n_c.
4. Hence every class comes in every epoch, and so does every sample of a class that is not cut.
   A class is cut if ceil(n_c / K) > S: it would have to come twice in a batch. Then it is in every
   batch of the epoch, K S of its samples are used, and those left out rotate: in each E =
   ceil(n_c / (K S)) epochs (0 .. E-1, E .. 2E-1, ...) each of its samples is used once or twice.
   What its missing groups leave free is filled by a larger q: by more passes of the others.
5. Permutations of samples, the order of the classes, the batches of a class and its place in them
   are drawn anew each epoch from (seed, epoch); the samples of a cut class every E epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from dist_dml.data.orders import Groups, Kept, Window, position_type
from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

# Samples whose permutations within their classes are sorted at a time: 100 MB of working memory.
_CHUNK = 2**22


class Quota(NamedTuple):
    """How many groups the classes have in an epoch.

    Attributes:
        groups: of each class, at least.
        steps: S.
        spare: groups of an epoch that go to some classes beside these.
        takers: the classes that can take one, in turns.
    """

    groups: Int64[np.ndarray, " g"]
    steps: int
    spare: int
    takers: Int64[np.ndarray, " t"]


class _Epoch(NamedTuple):
    """An epoch as groups, which are numbered through class by class.

    Attributes:
        groups: of each class.
        classes: in the order of the numbering.
        ends: one after the last number of each of `classes`.
        slots: number of the group that stands in slot p of step s.
        members: the samples by class, permuted within their class.
        skipped: places in its members that a class begins after.
    """

    groups: Int[np.ndarray, " g"]
    classes: Int[np.ndarray, " g"]
    ends: Int[np.ndarray, " g"]
    slots: Int[np.ndarray, "S P"]
    members: Int[np.ndarray, " n"]
    skipped: Int[np.ndarray, " g"]


@dataclass(frozen=True, eq=False)
class BalancedOrder:
    """P classes with K samples in every K P draws; the rule is this module's docstring.

    Attributes:
        classes: the samples by class.
        classes_per_batch: P.
        samples_per_class: K.
        seed: of all permutations.
    """

    classes: Groups
    classes_per_batch: int
    samples_per_class: int
    seed: int

    def __post_init__(self) -> None:
        found, per_class = len(self.classes.codes), self.samples_per_class
        if found < self.classes_per_batch:
            raise UsageError(
                f"data.batch_size={self.classes_per_batch * per_class} with "
                f"data.samples_per_class={per_class} needs {self.classes_per_batch} classes in a "
                f"batch and the split has {found}; set data.batch_size to at most "
                f"{found * per_class} or raise data.samples_per_class"
            )

    @cached_property
    def quota(self) -> Quota:
        """Groups of the classes, the same in every epoch but for the spare ones."""
        return quota_of(self.classes.sizes, self.classes_per_batch, self.samples_per_class)

    @property
    def num_draws(self) -> int:
        """See `dist_dml.data.orders.Order`: whole batches only."""
        return self.quota.steps * self.classes_per_batch * self.samples_per_class

    @cached_property
    def _epoch(self) -> Kept[_Epoch]:
        return Kept(self._arrange)

    def _arrange(self, epoch: int) -> _Epoch:
        """Deal the groups, sorted by class, to the steps in turn.

        A class with at most S groups meets no step twice, and each step gets P groups.
        """
        groups, steps, spare, takers = self.quota
        draw = generator(key_of(self.seed, "balanced", epoch))
        if spare:
            groups = groups.copy()
            groups[takers[(epoch * spare + np.arange(spare)) % len(takers)]] += 1
        classes = np.arange(len(groups), dtype=np.int32)
        draw.shuffle(classes)
        order = np.arange(steps)
        draw.shuffle(order)
        slots = (np.arange(self.classes_per_batch) * steps + order[:, None]).astype(
            position_type(steps * self.classes_per_batch)
        )
        draw.permuted(slots, axis=1, out=slots)
        members = permuted_within(self.classes, draw)
        skipped = self._rotate_cut(members, epoch)
        return _Epoch(groups, classes, np.cumsum(groups[classes]), slots, members, skipped)

    def _rotate_cut(self, members: Int[np.ndarray, " n"], epoch: int) -> Int64[np.ndarray, " g"]:
        """Give the cut classes, fewer than P, their places in `members`, whose own draws they do
        not follow: a permutation that lasts until it is used up.

        Returns:
            How far each class has come in its permutation in earlier epochs.
        """
        used = self.quota.steps * self.samples_per_class
        skipped = np.zeros(len(self.classes.codes), np.int64)
        for i in np.flatnonzero(self.classes.sizes > used).tolist():
            block, number = divmod(epoch, -(-int(self.classes.sizes[i]) // used))
            mine = slice(int(self.classes.starts[i]), int(self.classes.starts[i + 1]))
            key = key_of(self.seed, "balanced cut", int(self.classes.codes[i]), block)
            order = generator(key).permutation(mine.stop - mine.start)
            members[mine] = self.classes.at(mine.start + order)
            skipped[i] = number * used
        return skipped

    def take(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " d"]:
        """See `dist_dml.data.orders.Order`; K draws that follow each other are of one class."""
        now = self._epoch(epoch)
        slot, within = np.divmod(np.arange(start, stop), self.samples_per_class)
        number = now.slots.reshape(-1)[slot].astype(np.int64)
        place = np.searchsorted(now.ends, number, "right")
        which = now.classes[place]
        group = number - now.ends[place] + now.groups[which]
        turn = now.skipped[which] + group * self.samples_per_class + within
        member = self.classes.starts[which] + turn % self.classes.sizes[which]
        return now.members[member].astype(np.int64)

    def windows_from(self, draw: int) -> Iterator[Window]:
        """None: it draws from all classes at once."""
        return iter(())

    def identity(self) -> dict[str, Any]:
        """See `dist_dml.data.orders.Order`."""
        return {"order": "balanced", "samples_per_class": self.samples_per_class}


def quota_of(sizes: Int64[np.ndarray, " g"], classes_per_batch: int, per_class: int) -> Quota:
    """The groups of each class in an epoch: points 1 and 2 of the module's rule.

    Args:
        sizes: n_c.
        classes_per_batch: P, at most the number of classes.
        per_class: K.
    """
    steps = -(-int((-(-sizes // per_class)).sum()) // classes_per_batch)
    total = steps * classes_per_batch
    # There are few different sizes, whatever the number of classes: bisection costs nothing.
    distinct, index, number = np.unique(sizes, return_inverse=True, return_counts=True)

    def groups(passes: float) -> np.ndarray:
        return np.minimum(steps, np.ceil(passes * (distinct / per_class))).astype(np.int64)

    def fits(passes: float) -> bool:
        return int((groups(passes) * number).sum()) <= total

    low, high = 1.0, float(steps * per_class)  # With `high`, every class is in every batch.
    if fits(high):
        low = high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if fits(middle) else (low, middle)
    chosen = groups(low)[index]
    spare = total - int(chosen.sum())
    takers = np.flatnonzero(chosen < steps)
    assert 0 <= spare <= len(takers), "q was not the largest"
    return Quota(chosen, steps, spare, takers)


def permuted_within(groups: Groups, draw: np.random.Generator) -> Int[np.ndarray, " n"]:
    """The grouped positions, uniformly permuted within each group.

    Sorts (group, random bits, place) packed into 64 bits, some groups at a time. The keys are
    distinct, so the result does not depend on the sorting algorithm, which differs by processor.
    At least 20 bits are random; the smaller the groups that share a sort, the fewer matter.
    """
    shuffled = np.empty(groups.num_rows, position_type(groups.num_rows))
    first = 0
    while first < len(groups.codes):
        reach = np.searchsorted(groups.starts, groups.starts[first] + _CHUNK, "right") - 1
        stop = max(first + 1, int(reach))
        low, high = int(groups.starts[first]), int(groups.starts[stop])
        place_bits = (high - low - 1).bit_length()
        random_bits = min(63, 64 - place_bits - (stop - first - 1).bit_length())
        keys = np.repeat(np.arange(stop - first, dtype=np.uint64), groups.sizes[first:stop])
        keys <<= np.uint64(random_bits)
        keys |= draw.integers(0, 2**random_bits, high - low, dtype=np.uint64)
        keys <<= np.uint64(place_bits)
        keys |= np.arange(high - low, dtype=np.uint64)
        keys.sort()
        keys &= np.uint64(2**place_bits - 1)
        shuffled[low:high] = groups.at(keys.astype(np.int64) + low)
        first = stop
    return shuffled
