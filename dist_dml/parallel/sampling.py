"""Which classes take part in a step: the batch's labels, and random ones or their neighbours.

*Random, importance-corrected.* With A the batch's labels, which always take part, and S the other
classes that were drawn, each by itself with chance q, a row's estimated sum of exponentials is

    Z^ = sum_{j in A} exp(s_j) + sum_{j in S} exp(s_j - log q),   and
    E[Z^] = sum_{j in A} exp(s_j) + sum_{j not in A} q exp(s_j) / q = Z.

This holds for every row: another row's label is in A by certainty too, and gets no factor. The
usual logQ correction takes log q off *all* logits, as if the positive had been drawn like the
others; it counts A's exponentials 1 / q times (arXiv 2507.09331 finds the same flaw in sampled
softmax). What is right in the mean is Z^, not log Z^: the concave logarithm makes the loss too
small by about Var(Z^) / (2 Z^2), where Var(Z^) = (1 / q - 1) sum_{j not in A} exp(2 s_j). That is
little while no class that can be missed has much of the mass.

*Random, as published* (Partial FC): no correction. The normaliser lacks a share 1 - q of the
others' mass, which acts like a margin that grows with log(1 / q).

*Neighbours* (KNN softmax, arXiv 2102.06025): the classes nearest to the batch's labels. Those that
are left out have small exponentials, but are never pushed: biased, without a correction.

Dimensions: R rows of the whole batch, U distinct labels among them, C classes of all workers, c of
this one, n of them that take part, D features, k neighbours, W workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from dist_dml.class_config import ClassesConfig
from dist_dml.errors import UsageError
from dist_dml.keyed_random import key_of, row_keys
from dist_dml.loss_config import LossConfig
from dist_dml.parallel.class_partition import ClassPartition, part_bounds
from dist_dml.parallel.collectives import gather_equal, gather_uneven

# Classes that share a key; their numbers differ by a 32-bit mixer. Two buffers of a block (512 KiB)
# stay in a core's cache: 10^6 classes took 1.9 ms in blocks of 2^16, 3.3 ms in blocks of 2^14 (one
# thread of an AVX-512 machine, November 2026).
_BLOCK = 2**16
# A GPU takes many blocks at a time (two buffers of 64 MiB), to launch fewer kernels.
_BLOCKS_AT_ONCE = {"cpu": 1}
_BLOCKS_AT_ONCE_ELSEWHERE = 256
# Multipliers of Wellons' triple32, a 32-bit mixer found by search for the least bias.
_MULTIPLIERS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class ActiveClasses:
    """The classes of this worker that take part in a step.

    Attributes:
        ids: ascending local ids. There may be none (n = 0): a worker of few classes may draw none.
        correction: what is added to each one's logit; None for zeros.
    """

    ids: Int64[Tensor, " n"]
    correction: Float32[Tensor, " n"] | None = None


def random_classes(
    labels: Int64[Tensor, " R"],
    partition: ClassPartition,
    rate: float,
    correction: Literal["importance", "none"],
    seed: int,
    step: int,
    device: torch.device | str,
) -> ActiveClasses:
    """The batch's labels, and every other class with chance `rate`.

    Whether a class is drawn is a function of (seed, step, its global id): the set is the same for
    any number of workers and tiles, nothing has to be agreed on, and a checkpoint holds none of it.
    Draws are independent, so n varies by about sqrt(rate * c) around its mean. A fixed n, as in
    Partial FC, would make draws depend on each other and on the partition.

    Costs 12 passes of 32-bit arithmetic over the ids, c + O(1) bytes beyond the result, and one
    wait for the device (n must be known): 4.7 ms for 10^6 classes, 0.56 s for 10^8 (one thread,
    AVX-512, rate 0.1, November 2026), of which two fifths turn the mask into ids.

    Args:
        labels: global labels of all rows of the batch, the same on every worker; on `device`.
            Negative ones belong to no class.
        partition: this worker's classes.
        rate: 0 < rate <= 1. It is rounded to a multiple of 2^-32; the correction follows it.
        correction: `importance` gives the drawn classes -log(rate) and the labels 0, see above.
        seed: of the run.
        step: of the run; micro-batches of a step share its draws.
        device: of the result.
    """
    device = torch.device(device)
    assert 0 < rate <= 1
    below = min(max(round(rate * 2**32), 1), 2**32)
    first = partition.start // _BLOCK
    blocks = (partition.stop - 1) // _BLOCK + 1 - first
    # One more entry takes the labels of other workers, so that none has to be filtered out.
    mask = torch.empty(blocks * _BLOCK + 1, dtype=torch.bool, device=device)
    key = key_of(seed, "class sample", step)
    _draw_(mask[:-1].view(blocks, _BLOCK), first, key, below)
    offset = partition.start - first * _BLOCK
    own = (labels >= partition.start) & (labels < partition.stop)
    mask[torch.where(own, labels - first * _BLOCK, len(mask) - 1)] = True
    ids = mask[offset : offset + partition.size].nonzero().squeeze(1)
    if correction == "none":
        return ActiveClasses(ids)
    drawn = math.log(2**32 / below)
    added = torch.full((len(ids) + 1,), drawn, dtype=torch.float32, device=device)
    position = torch.searchsorted(ids, labels - partition.start)
    added[torch.where(own, position, len(ids))] = 0.0
    return ActiveClasses(ids, added[:-1])


def _draw_(mask: Bool[Tensor, "b m"], first: int, key: int, below: int) -> None:
    """Write whether each class of the blocks `first`, `first + 1`, ... is drawn.

    A block has a 64-bit key, whose halves k and h enter the class's number x (its place in the
    block) by x = mix((x ^ k) * m) ^ h ...: every bit of a step's key changes what a block draws,
    and each class is drawn with chance below / 2^32 exactly, as every operation is a bijection.
    """
    ids = torch.arange(first, first + len(mask), device=mask.device)
    keys = row_keys(key, ids)
    low, high = keys.to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]
    lane = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    at_once = min(len(mask), _BLOCKS_AT_ONCE.get(mask.device.type, _BLOCKS_AT_ONCE_ELSEWHERE))
    buffer = torch.empty(2, at_once, mask.shape[1], dtype=torch.int32, device=mask.device)
    multipliers = [m - 2**32 if m >= 2**31 else m for m in _MULTIPLIERS]
    for start in range(0, len(mask), at_once):
        rows = slice(start, min(start + at_once, len(mask)))
        x, shifted = buffer[:, : rows.stop - start]
        torch.bitwise_xor(lane, low[rows], out=x)
        x.mul_(multipliers[0]).bitwise_xor_(high[rows])
        _xor_shift_(x, shifted, 15)
        x.mul_(multipliers[1])
        _xor_shift_(x, shifted, 16)
        x.mul_(multipliers[2])
        if below == 2**32:  # No int32 is above all others.
            mask[rows] = True
        else:  # Compared as signed numbers: which half of them counts as low does not matter.
            torch.lt(x, below - 2**31, out=mask[rows])


def _xor_shift_(x: Tensor, shifted: Tensor, bits: int) -> None:
    """x ^= x >> bits. `>>` copies the sign, and torch has no shift of uint32: it is masked off."""
    torch.bitwise_right_shift(x, bits, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(2 ** (32 - bits) - 1))


def neighbour_classes(
    labels: Int64[Tensor, " R"],
    weight: Float[Tensor, "c D"],
    search: Search,
    partition: ClassPartition,
    num_neighbours: int,
) -> ActiveClasses:
    """The classes nearest to the batch's labels among all workers' classes, and these labels.

    For each label the `num_neighbours` classes whose weights are most similar to the label's own,
    itself counted where it is among them (for cosines it is), and all that tie with the last of
    them. Biased: far classes are never pushed away, and come closer unseen until they are
    neighbours; nothing corrects for it.

    With an exact `search`, the same for any number of workers (but for ties to rounding). Costs one
    all-gather of the labels' weights (U x D numbers in all, never c x D), one of U x k scores a
    worker, this worker's search of U vectors, and waits for the device.

    Args:
        labels: of all rows of the batch, the same on every worker; negative ones are no class.
        weight: this worker's, as they are now.
        search: (vectors (U, D) float32, k) -> the k best scores in descending order, -inf where
            there are fewer, and their local ids, -1 there (both (U, k)), among this worker's
            classes. Positive factors of a vector do not matter. See `retrieval.class_index`.
        partition: this worker's classes, one of `part_bounds`.
        num_neighbours: k.
    """
    distinct = labels[labels >= 0].unique()
    own = _own_counts(distinct, partition)
    rank = 0 if partition.group is None else partition.group.rank()
    mine = distinct[sum(own[:rank]) :][: own[rank]] - partition.start
    if len(distinct) == 0:
        return ActiveClasses(mine)
    # Sorted labels are the workers' own ones in worker order: what is gathered is in order.
    vectors = gather_uneven(weight[mine].float(), own, partition.group)
    scores, ids = search(vectors, num_neighbours)
    every = gather_equal(scores, partition.group).transpose(0, 1).flatten(1)
    worst = every.topk(num_neighbours, dim=1).values[:, -1:]
    found = ids[(scores >= worst) & (ids >= 0)]
    return ActiveClasses(torch.cat((found, mine)).unique())


def _own_counts(distinct: Int64[Tensor, " U"], partition: ClassPartition) -> tuple[int, ...]:
    """How many of the sorted labels each worker owns."""
    workers = 1 if partition.group is None else partition.group.size()
    bounds = [part_bounds(worker, workers, partition.num_classes) for worker in range(workers)]
    assert (partition.start, partition.stop) in bounds
    stops = torch.tensor([stop for _, stop in bounds], device=distinct.device)
    cuts = [0, *torch.searchsorted(distinct, stops).tolist()]
    return tuple(stop - start for start, stop in pairwise(cuts))


def columns_of(
    labels: Int64[Tensor, " R"], active: ActiveClasses, partition: ClassPartition
) -> Int64[Tensor, " R"]:
    """Position of each row's label among the active classes; -1 where it is not this worker's."""
    local = labels - partition.start
    if len(active.ids) == 0:
        return torch.full_like(labels, -1)
    position = torch.searchsorted(active.ids, local).clamp_max_(len(active.ids) - 1)
    return torch.where(active.ids[position] == local, position, -1)


def check_sampling(classes: ClassesConfig, loss: LossConfig) -> None:
    """Refuses to leave out classes that the loss needs.

    Raises:
        UsageError: with the reason, the keys, and what to do.
    """
    if classes.sample == "all":
        return
    reason, remedy = None, "set classes.sample=all, which every loss takes"
    if loss.label_smoothing > 0:
        reason = "its smoothed target gives every class a share, also those that are left out"
        remedy = "set loss.label_smoothing=0 or classes.sample=all"
    elif loss.num_centres > 1:
        reason = f"a class has {loss.num_centres} rows of weights, and sampling takes single rows"
        if loss.name == "soft_triple" and loss.centre_spread > 0:
            reason += "; its term on centres sums over all classes as well"
    elif loss.name in _NEEDS_ALL:
        reason = _NEEDS_ALL[loss.name]
    if reason is not None:
        raise UsageError(
            f"classes.sample={classes.sample} does not fit loss.name={loss.name}: {reason}; "
            f"{remedy}"
        )


_METRIC = "it is a distance of whole probability vectors, with a sum over all classes"
_NEEDS_ALL = {
    "l1": _METRIC,
    "l2": _METRIC,
    "binary_cross_entropy": (
        "every class is a decision of its own, so one that is left out is not trained, and a "
        "correction of its logit would change the decision instead of its weight"
    ),
    "proxy_anchor": (
        "it averages over all classes a loss of each one, and a correction of logits would change "
        "these losses instead of their weights"
    ),
}
