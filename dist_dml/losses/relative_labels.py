"""Relative labels: the same rows under several labellings at once.

Dimensions: m anchors, R rows, n any rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dist_dml.losses.pairs import AnchorLoss, Comparison, LabelledPairs, PairLoss, Pairs


@dataclass(frozen=True)
class RelativeLoss:
    """A loss under one of several labellings of the same rows (paper B, appendix D).

    A labelling puts every class into one set, or into none; with several of them a row is in
    several sets. Two rows are `same` if their classes are in one set of this labelling, and `other`
    if they are in two, whatever other labellings say: one may pull where another pushes. A row
    whose class is in no set takes no part. The loss of the batch is the sum over labellings, each
    with its own mean: pooled ones would let a labelling that knows few rows vanish.

    Attributes:
        loss: of the sets.
        sets: (C,) the set of each class; `LabelledPairs.ignored` for none.
    """

    loss: PairLoss
    sets: Int[Tensor, " C"]

    @property
    def comparison(self) -> Comparison:
        """That of the loss."""
        return self.loss.comparison

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """See `PairLoss`."""
        assert isinstance(pairs, LabelledPairs), "relative labels are made of labels"
        ignored = pairs.ignored
        mine, all_sets = (
            self.sets_of(pairs.anchor_labels, ignored),
            self.sets_of(pairs.labels, ignored),
        )
        known = (mine != ignored)[:, None] & (all_sets != ignored)
        alike = mine[:, None] == all_sets
        # An anchor and itself are neither.
        different = pairs.same | pairs.other
        found = self.loss.of_anchors(
            LabelledPairs(
                pairs.values,
                different & known & alike,
                different & known & ~alike,
                mine,
                all_sets,
                ignored,
            )
        )
        counted = mine != ignored
        return AnchorLoss(
            torch.where(counted, found.values, 0), torch.where(counted, found.weights, 0)
        )

    def sets_of(self, labels: Int[Tensor, " n"], ignored: int) -> Int[Tensor, " n"]:
        """The set of each row."""
        known = labels != ignored
        return torch.where(known, self.sets[torch.where(known, labels, 0)], ignored)
