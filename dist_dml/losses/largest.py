"""The few largest entries of each row of a tile, at little more than the price of its maximum.

Dimensions: R rows, t columns of a tile, M entries kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Columns of a group. Groups are strided (every n-th column), so that their maximum is a vertical
# one, which vectorises; a horizontal maximum of 16 neighbours does not.
_GROUP = 16
# With fewer groups than this of each kept entry, the candidates would be most of the tile.
_FEWEST_GROUPS = 4
# Numbers of a row that the candidates take, of each: an index of 8 bytes and a value of 4.
_CANDIDATE_NUMBERS = 3
# The rows are taken in as many turns as keep the candidates below this share of the tile.
_LARGEST_SHARE = 1 / 8


def largest_entries(
    tile: Float[Tensor, "R t"], count: int
) -> tuple[Float[Tensor, "R M"], Int[Tensor, "R M"]]:
    """The `count` largest entries of each row, in descending order, and their columns.

    Equal to `tile.topk(count)`, filled up with -inf (and column 0) if t < count. Costs one pass for
    the maxima of groups: the M largest entries lie in the M groups with the largest maxima. Holds
    about an eighth of the tile.
    """
    rows, columns = tile.shape
    num_groups = columns // _GROUP
    if num_groups <= _FEWEST_GROUPS * count:
        values, places = tile.topk(min(count, columns), dim=1)
        missing = (0, count - values.shape[1])
        return F.pad(values, missing, value=float("-inf")), F.pad(places, missing)
    held = _CANDIDATE_NUMBERS * (count * _GROUP + columns % _GROUP) + num_groups
    turns = min(rows, math.ceil(held / (columns * _LARGEST_SHARE)))
    found = [_largest_by_groups(part, count) for part in tile.tensor_split(turns)]
    values, places = zip(*found, strict=True)
    return torch.cat(values), torch.cat(places)


def _largest_by_groups(tile: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows, columns = tile.shape
    num_groups = columns // _GROUP
    grouped = num_groups * _GROUP
    maxima = tile[:, :grouped].unflatten(1, (_GROUP, num_groups)).amax(1)
    groups = maxima.topk(count, dim=1, sorted=False).indices
    strides = torch.arange(_GROUP, device=tile.device) * num_groups
    candidates = (groups[:, :, None] + strides).flatten(1)
    if grouped < columns:
        rest = torch.arange(grouped, columns, device=tile.device).expand(rows, -1)
        candidates = torch.cat((candidates, rest), dim=1)
    values, order = tile.gather(1, candidates).topk(count, dim=1)
    return values, candidates.gather(1, order)
