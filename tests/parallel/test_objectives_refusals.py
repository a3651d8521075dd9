"""Parameters that no loss can have are refused in one line that names the condition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dist_dml.config import Config, OptimizerConfig
from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.loss_tables import READS
from dist_dml.losses.objectives import build_objective
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"name": "arcface", "cosine_margin": 0.3},
        r"loss\.cosine_margin=0\.3 is not read by loss\.name=arcface, which reads scale, "
        "temperature, angle_margin",
    ),
    ({"name": "cross_entropy", "p": 0.5}, r"loss\.p=0\.5 is not read by loss\.name=cross_entropy"),
    ({"name": "l1", "p": 0.5}, r"loss\.p=0\.5 is not read by loss\.name=l1"),
    ({"name": "l2", "label_smoothing": 0.1}, r"loss\.label_smoothing=0\.1 is not read"),
    ({"name": "proxy_nca", "centres": 3}, r"loss\.centres=3 is not read"),
    ({"name": "cosface", "bias": False}, r"loss\.bias=False is not read"),
    (
        {"similarity": "cosine", "scale": 16, "temperature": 0.05},
        r"loss\.scale=16 and loss\.temperature=0\.05 say the same",
    ),
    ({"scale": 16}, r"loss\.scale=16 is a factor of cosines.* set loss\.similarity=cosine"),
    ({"temperature": 0.1}, r"loss\.temperature=0\.1 is a factor of cosines"),
    (
        {"name": "arcface", "similarity": "linear"},
        r"loss\.similarity=linear does not fit loss\.name=arcface",
    ),
    ({"similarity": "cosine", "init_std": 0}, r"loss\.init_std=0 .* without a direction"),
    ({"name": "l2", "k": 0.5, "a": 0.1}, r"loss\.k=0\.5 and loss\.a=0\.1: set one"),
    ({"name": "l2", "k": 1.5}, "k=1.5 breaks 0 < k <= 1"),
    ({"name": "l2", "k": float("nan")}, "k\n.*should be a finite number"),
    ({"name": "l2", "a": -0.5}, "a=-0.5 breaks a >= 0"),
    ({"name": "l2", "p": 0}, "greater than 0"),
    ({"name": "l2", "p": 1.5}, "less than or equal to 1"),
    (
        {"name": "l2", "p": 0.5, "sums": "powers"},
        r"loss\.sums=powers with loss\.p=0\.5: .* below p = 0\.85",
    ),
    ({"name": "soft_triple", "centres": 1}, "soft_triple needs 2 or more"),
    ({"name": "arcface", "angle_margin": 1.6}, "less than 1.57"),
    ({"name": "arcface", "scale": 0}, "greater than 0"),
    ({"name": "combined_margin", "angle_multiplier": 0.5}, "greater than or equal to 1"),
    (
        {"name": "dynamic_arcface", "dynamic_margin": (1.5, 0.1, 0.25)},
        r"a \+ b = 1\.6, .* below pi / 2",
    ),
    ({"label_smoothing": 1.0}, "less than 1"),
    ({"name": "tripled"}, "'cross_entropy', 'normalised_softmax'"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[str(keys) for keys, _ in REFUSED])
def test_a_wrong_key_is_refused_with_the_condition_it_breaks(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        LossConfig(**keys)


def test_every_loss_is_built_from_its_name_alone() -> None:
    counts = torch.tensor([3, 1, 4, 1, 5])
    for name in READS:
        objective = build_objective(
            LossConfig.model_validate({"name": name}), 5, slice(1, 3), counts
        )
        assert (objective.scale is None) == (
            not LossConfig.model_validate({"name": name}).uses_cosine
        )


@pytest.mark.parametrize("name", ["proxy_anchor", "adaface"])
def test_losses_that_couple_rows_refuse_micro_batches(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"accumulate=2 .* loss\.name={name} depend on each"):
        Config.model_validate({"loss": {"name": name}, "training": {"accumulate": 2}})


def build(counts: list[int] | None, /, num_classes: int = 5, **keys: Any) -> None:
    class_counts = None if counts is None else torch.tensor(counts)
    build_objective(LossConfig(**keys), num_classes, slice(0, 2), class_counts)


def test_losses_that_follow_class_sizes_need_them() -> None:
    followers: tuple[dict[str, Any], ...] = (
        {"name": "balanced_softmax"},
        {"name": "dynamic_arcface"},
        {"name": "l1", "class_weights": "inverse"},
    )
    for keys in followers:
        with pytest.raises(UsageError, match="number of training images of each class"):
            build(None, **keys)
    with pytest.raises(UsageError, match="balanced_softmax: 2 of 5 classes have no training"):
        build([3, 0, 4, 0, 5], name="balanced_softmax")
    # The others give an empty class the weight, or margin, of a single image.
    build([3, 0, 4, 0, 5], name="dynamic_arcface")
    build([3, 0, 4, 0, 5], class_weights="effective")


def test_proxy_anchor_refuses_weights_of_rows() -> None:
    with pytest.raises(UsageError, match=r"loss\.class_weights weighs rows, and proxy_anchor sums"):
        build([1, 2, 3, 4, 5], name="proxy_anchor", class_weights="inverse")
    partition = ClassPartition.of_worker(0, 1, 5)
    classifier = ClassParallelClassifier(
        4, partition, LossConfig(name="proxy_anchor"), OptimizerConfig(), 0, 3
    )
    rows, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(UsageError, match="couples the rows of a batch: it takes no row weights"):
        classifier(rows, labels, (3,), 3, torch.ones(3))
    with pytest.raises(UsageError, match=r"training\.accumulate=1"):
        classifier(rows, labels, (3,), 6)


def test_a_single_class_is_refused_by_all_that_need_a_rival() -> None:
    for keys in ({"name": "l1"}, {"name": "arcface"}, {"label_smoothing": 0.1}):
        with pytest.raises(UsageError, match="with 1 class: needs at least 2 classes"):
            build([1], num_classes=1, **keys)
