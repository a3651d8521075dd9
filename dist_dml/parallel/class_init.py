"""The class weights that a training starts from.

Dimensions: c classes of this worker, D features of a class, those of all its centres together.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.keyed_random import key_of, keyed_normal, row_keys
from dist_dml.parallel.class_partition import ClassPartition

# Class weights are drawn this many rows at a time, to bound the temporaries of the generator.
_INIT_ROWS = 65_536


def initial_weight(
    partition: ClassPartition, embedding_dim: int, std: float, seed: int, dtype: torch.dtype
) -> Float[Tensor, "c D"]:
    """Normal weights drawn by class id: the same for any number of workers."""
    weight = torch.zeros(partition.size, embedding_dim, dtype=dtype)
    if std == 0:
        return weight
    for start in range(0, partition.size, _INIT_ROWS):
        rows = weight[start : start + _INIT_ROWS]
        ids = torch.arange(len(rows)) + (partition.start + start)
        rows.copy_(initial_rows(ids, embedding_dim, std, seed))
    return weight


def initial_rows(
    ids: Int[Tensor, " n"], embedding_dim: int, std: float, seed: int
) -> Float[Tensor, "n D"]:
    """Those of some classes, by their ids."""
    return keyed_normal(row_keys(key_of(seed, "class weight"), ids), embedding_dim) * std
