"""From the configuration to losses of pairs: what each `loss.name` without class weights is.

Dimensions: n rows, D features, C classes, L labellings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.loss_config import LossConfig
from dist_dml.losses.center import CenterLoss
from dist_dml.losses.contrastive import Contrastive, c1, c2
from dist_dml.losses.fastap import FastAP
from dist_dml.losses.multi_similarity import MultiSimilarity
from dist_dml.losses.mutual_information import multi_similarity_parts, snca_parts
from dist_dml.losses.pairs import PairLoss, compare, labelled_pairs_of
from dist_dml.losses.pairwise_cross_entropy import SPCE
from dist_dml.losses.relative_labels import RelativeLoss
from dist_dml.losses.snca import NeighbourhoodComponents
from dist_dml.losses.triplet import Triplet


@dataclass(frozen=True)
class PairObjective:
    """What a batch of rows loses by its pairs.

    Attributes:
        losses: whose results are added up, each with its own mean: C2's two parts.
        normalised: whether rows are made unit vectors first. Inner products and SPCE take them as
            they come.
    """

    losses: tuple[PairLoss, ...]
    normalised: bool


@dataclass(frozen=True)
class LabelSets:
    """Labellings that take the place of the classes.

    Attributes:
        sets: the set of each class in each of L labellings; `loss.ignore_index` for none.
        counts: sets of each labelling.
    """

    sets: Int[Tensor, "L C"]
    counts: tuple[int, ...]


def build_pair_objective(
    config: LossConfig, num_classes: int, label_sets: LabelSets | None = None
) -> PairObjective:
    """The objective that `loss.name` names.

    Args:
        config: the loss section, of a loss of pairs.
        num_classes: C, which SPCE sums over.
        label_sets: of `loss.label_sets`, on the rows' device.

    Raises:
        UsageError: for parameters outside a loss's definition.
    """
    assert config.of_pairs, config.name
    if label_sets is not None:
        found = [
            (_losses_of(config, count), sets)
            for count, sets in zip(label_sets.counts, label_sets.sets, strict=True)
        ]
        losses = tuple(RelativeLoss(loss, sets) for every, sets in found for loss in every)
        return PairObjective(losses, all(loss.comparison != "inner" for loss in losses))
    losses = _losses_of(config, num_classes)
    return PairObjective(losses, all(loss.comparison != "inner" for loss in losses))


def _losses_of(config: LossConfig, num_classes: int) -> tuple[PairLoss, ...]:
    comparison = config.setting("comparison")
    build: dict[str, Callable[[], tuple[PairLoss, ...]]] = {
        "contrastive": lambda: _contrastive(config),
        "c1": lambda: (c1(config.setting("negative_margin")),),
        "c2": lambda: c2(config.setting("positive_margin"), config.setting("negative_margin")),
        "triplet": lambda: (
            Triplet(config.triplet_margin, config.mining, comparison, config.setting("reduction")),
        ),
        "multi_similarity": lambda: (
            MultiSimilarity(
                config.alpha, config.beta, config.base, config.mining_epsilon, comparison
            ),
        ),
        "snca": lambda: (NeighbourhoodComponents(1 / config.factor, comparison),),
        "fastap": lambda: (FastAP(config.bins),),
        "spce": lambda: (SPCE(num_classes),),
        "center": lambda: (CenterLoss(),),
    }
    return build[config.name]()


def _contrastive(config: LossConfig) -> tuple[PairLoss, ...]:
    reduction = config.setting("reduction")
    whole = Contrastive(
        config.setting("comparison"),
        config.setting("positive_margin"),
        config.setting("negative_margin"),
        config.setting("power"),
    )
    if reduction == "anchors":
        return (whole,)
    # Each part has its own terms above zero, hence its own mean.
    return tuple(replace(part, reduction="nonzero") for part in whole.parts())


@torch.no_grad()
def parts_of_rows(
    objective: PairObjective, rows: Float[Tensor, "n D"], labels: Int[Tensor, " n"], ignored: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]] | None:
    """Tightness and contrastive part (paper B, Table 2) of some rows; their sum is the loss.

    The losses themselves, split: of C1 and C2 as they are configured, not the table's squares. None
    under relative labels, and for losses that have no such parts: a triplet holds both in one term,
    FastAP is a ratio, and center loss is tightness alone. Holds a few n x n buffers.
    """
    own = torch.arange(len(rows), device=rows.device)
    loss = objective.losses[0]
    pairs = labelled_pairs_of(compare(rows, rows, loss.comparison), labels, labels, own, ignored)
    if isinstance(loss, Contrastive):
        parts = loss.parts() if len(objective.losses) == 1 else objective.losses
        found = [part.of_anchors(pairs) for part in parts]
        means = [one.values.sum() / one.weights.sum().clamp_min(1) for one in found]
        return means[0], means[1]
    if isinstance(loss, MultiSimilarity) and loss.epsilon is None:
        return multi_similarity_parts(pairs, loss.alpha, loss.beta, loss.base).means()
    if isinstance(loss, NeighbourhoodComponents):
        return snca_parts(pairs, loss.temperature).means()
    if isinstance(loss, SPCE):
        return loss.parts(pairs).means()
    return None
