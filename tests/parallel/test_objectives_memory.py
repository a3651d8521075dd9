"""The memory of a step does not depend on the loss: the tiles follow what each one holds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.loss_tables import READS
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

TORCH = ClassesConfig(backend="torch")
C, D, R, MEBIBYTES = 20_000, 16, 128, 4.0
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in READS),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"similarity": "cosine", "class_weights": "inverse"}),
    ("l1", {"sums": "sweep"}),
    ("l2", {"p": 0.9, "similarity": "cosine"}),
    ("l2", {"p": 0.5, "k": 0.8, "class_weights": "effective"}),
    ("sub_centre_arcface", {"centres": 10}),
    ("soft_triple", {"centres": 2}),
    ("cross_entropy", {"tile_dtype": "bfloat16"}),
    ("l1", {"tile_dtype": "bfloat16"}),
    ("sub_centre_arcface", {"tile_dtype": "bfloat16", "centres": 10}),
    ("soft_triple", {"tile_dtype": "bfloat16"}),
]


def peak_share(config: LossConfig) -> float:
    """The most memory of a step beyond weights and state, as a share of the budget."""
    partition, counts = ClassPartition.of_worker(0, 1, C), torch.arange(1, C + 1) % 50 + 1
    classifier = ClassParallelClassifier(
        D, partition, config, OptimizerConfig(), 0, R, class_counts=counts, classes=TORCH
    )
    # As large a tile as the budget allows, not the one that the cost model finds fastest.
    classifier.plan = classifier.plan._replace(sweep="recompute", tile_classes=0, row_chunk=0)
    labels = torch.arange(R) * (C // R)

    def step() -> None:
        rows = torch.randn(R, D, requires_grad=True)
        classifier(rows, labels, (R,), R, factor=1.0).loss.backward()

    step()
    with LiveBytes() as counter:
        step()
    return counter.peak / (MEBIBYTES * 2**20)


@cache
def share_of_cross_entropy(tile_dtype: Any) -> float:
    return peak_share(
        LossConfig(name="cross_entropy", tile_mebibytes=MEBIBYTES, tile_dtype=tile_dtype)
    )


@pytest.mark.parametrize(("name", "keys"), VARIANTS, ids=[f"{n} {k}" for n, k in VARIANTS])
def test_every_loss_needs_the_memory_of_cross_entropy(name: Any, keys: dict[str, Any]) -> None:
    share = peak_share(LossConfig(name=name, tile_mebibytes=MEBIBYTES, **keys))
    usual = share_of_cross_entropy(keys.get("tile_dtype", "float32"))
    assert 0.85 <= usual <= 1.0  # The count is not blind: most of the budget is used.
    assert 0.9 * usual <= share <= min(1.0, 1.1 * usual)
