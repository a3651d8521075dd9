"""What paper A's losses read off a row's statistics: differences of logits, and the top rival.

Dimensions: R rows, M kept rivals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_dml.losses.softmax import TileTarget

# A class id is two floats: one would round ids above 2^24 in float32.
_ID_BASE = 4096


@dataclass(frozen=True)
class RowView:
    """A row's numbers, all logits taken from `peak`, the largest of the row.

    The log-sum-exps are over all classes (`log_mass`), all but the label, all but the top rival.
    """

    peak: Float[Tensor, " R"]
    label: Float[Tensor, " R"]
    top: Float[Tensor, " R"]
    log_mass: Float[Tensor, " R"]
    lse_but_label: Float[Tensor, " R"]
    lse_but_top: Float[Tensor, " R"]
    top_id: Int[Tensor, " R"]

    @staticmethod
    def of(
        label: Float[Tensor, " R"],
        rivals: Float[Tensor, "M R"],
        mass: Float[Tensor, " R"],
        top_id: Float[Tensor, "2 R"],
    ) -> RowView:
        """From the label's logit, the largest others in descending order, and the rest's mass.

        Args:
            label: logits of the labels.
            rivals: -inf where there are fewer.
            mass: sum of exponentials of all other logits, from the last rival.
            top_id: the top rival's class, as `id_numbers` gives it.
        """
        peak = torch.maximum(label, rivals[0])
        label, rivals = label - peak, rivals - peak
        rest = rivals[-1] + mass.log()
        # Nothing left: with M rivals or fewer the mass is 0, and -inf + log 0 is no number.
        rest = rest.masked_fill(mass == 0, float("-inf"))
        floor = torch.finfo(label.dtype).min / 4  # A single class has no others at all.
        but_label = torch.cat((rivals, rest[None])).logsumexp(0).clamp_min(floor)
        but_top = torch.cat((label[None], rivals[1:], rest[None])).logsumexp(0)
        log_mass = torch.logaddexp(label, but_label)
        return RowView(peak, label, rivals[0], log_mass, but_label, but_top, id_of(top_id))

    @property
    def label_gap(self) -> Float[Tensor, " R"]:
        """The sum of all other probabilities is the sigmoid of this."""
        return self.lse_but_label - self.label

    @property
    def top_gap(self) -> Float[Tensor, " R"]:
        """The top rival's probability is the sigmoid of this."""
        return self.top - self.lse_but_top


def id_numbers(ids: Int[Tensor, " R"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Class ids as two numbers that any floating dtype of a loss holds exactly."""
    return (ids // _ID_BASE).to(dtype), (ids % _ID_BASE).to(dtype)


def id_of(numbers: Float[Tensor, "2 R"]) -> Int[Tensor, " R"]:
    """The inverse of `id_numbers`."""
    return numbers[0].long() * _ID_BASE + numbers[1].long()


def place_of(
    ids: Int[Tensor, " R"], target: TileTarget, num_columns: int
) -> tuple[Int[Tensor, " R"], Bool[Tensor, " R"]]:
    """The columns of class ids in a tile, and whether they are there."""
    column = ids - target.first_id
    present = (column >= 0) & (column < num_columns)
    return torch.where(present, column, 0), present
