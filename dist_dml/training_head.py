"""What stands behind the embedder of a training, as configured.

Dimensions: C classes, S sets of a labelling.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from dist_dml.config import Config
from dist_dml.data.index import Index
from dist_dml.data.label_sets import read_label_sets
from dist_dml.data.plan import Plan
from dist_dml.errors import UsageError
from dist_dml.losses.pair_objectives import LabelSets
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.heads import Head
from dist_dml.parallel.pair_head import PairHead
from dist_dml.parallel.proxy_head import ProxyHead
from dist_dml.parallel.world import World

# Other rows of its class that a row should meet in a batch, on average.
_FEWEST_PARTNERS = 0.5


def build_head(
    config: Config,
    embedding_dim: int,
    partition: ClassPartition,
    plan: Plan,
    index: Index,
    world: World,
) -> Head:
    """Class weights, pairs, or chance-constrained proxies.

    Args:
        config: of the run.
        embedding_dim: D.
        partition: this worker's classes.
        plan: for the most rows of a micro-batch.
        index: the data set.
        world: the workers.

    Raises:
        UsageError: for parameters that the loss does not take, and batches without partners.
    """
    counts = index.class_counts(config.data.split, partition.num_classes)
    dtype = sum_dtype(config)
    if config.proxies.per_class:
        # Rows have positives among the proxies, whatever else the batch holds.
        return ProxyHead(
            config.proxies,
            config.loss,
            config.optimizer,
            embedding_dim,
            partition,
            plan.max_micro_rows,
            world.device,
            dtype,
        )
    if config.loss.of_pairs:
        sets = label_sets_of(config, index, partition.num_classes)
        _check_partners(config, counts, sets)
        return PairHead(
            config.loss,
            embedding_dim,
            partition,
            plan.max_micro_rows,
            world.device,
            dtype,
            label_sets=sets,
        )
    return ClassParallelClassifier(
        embedding_dim,
        partition,
        config.loss,
        config.optimizer,
        config.run.seed,
        max_rows=plan.max_micro_rows,
        device=world.device,
        dtype=dtype,
        class_counts=counts,
        classes=config.classes,
        micro_batches=config.training.accumulate,
    )


def sum_dtype(config: Config) -> torch.dtype:
    """Of embeddings, class weights and sums: float64 for `engine.precision=float64`."""
    return torch.float64 if config.engine.precision == "float64" else torch.float32


def label_sets_of(config: Config, index: Index, num_classes: int) -> LabelSets | None:
    """Of `loss.label_sets`, by class id; classes beyond those of the index are in no set."""
    if not config.loss.label_sets:
        return None
    found = read_label_sets(
        config.loss.label_sets, index.class_names[: index.num_classes], config.loss.ignore_index
    )
    beyond = (0, num_classes - index.num_classes)
    return replace(found, sets=F.pad(found.sets, beyond, value=config.loss.ignore_index))


def _check_partners(
    config: Config, class_counts: Int[Tensor, " C"], label_sets: LabelSets | None
) -> None:
    """Refuse batches in which hardly any row has another one of its class: they teach nothing.

    Of several labellings the one with the largest sets is looked at.

    Raises:
        UsageError: with the number of partners to expect.
    """
    if config.data.order == "balanced":
        return
    sizes = _set_sizes(class_counts, label_sets, config.loss.ignore_index)
    alike = max(_alike(counts) for counts in sizes)
    partners = alike * (config.data.batch_size - 1 + config.loss.memory_size)
    if partners < _FEWEST_PARTNERS:
        raise UsageError(
            f"loss.name={config.loss.name} needs rows of the same class in a batch, and with "
            f"data.order={config.data.order} a row of {config.data.batch_size} has {partners:.2g} "
            "on average; set data.order=balanced"
        )


def _set_sizes(
    class_counts: Int[Tensor, " C"], label_sets: LabelSets | None, ignored: int
) -> list[Tensor]:
    """Images of each class, or of each set of each labelling."""
    if label_sets is None:
        return [class_counts]
    sizes = []
    for sets, count in zip(label_sets.sets, label_sets.counts, strict=True):
        known = sets != ignored
        size = class_counts.new_zeros(count + 1)  # One more, as `ignored` is passed over.
        sizes.append(size.index_add(0, sets[known], class_counts[known]))
    return sizes


def _alike(counts: Int[Tensor, " S"]) -> float:
    """The chance that two different images are of the same set."""
    sizes = counts.double()
    images = float(sizes.sum())
    return float((sizes * (sizes - 1)).sum()) / max(images * (images - 1), 1.0)
