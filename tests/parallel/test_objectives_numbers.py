"""Numbers of all objectives: finite at logits of 1e4, bfloat16 tiles, a million classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_losses import Batch, NormState, dense, metric_loss, random_batch
from tiled_losses import in_tiles
from torch import Tensor

from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.loss_tables import COSINE_LOSSES, READS
from dist_dml.losses.binary import BinaryCrossEntropy
from dist_dml.losses.cross_entropy import CrossEntropy
from dist_dml.losses.metric_softmax import MetricSoftmax
from dist_dml.losses.softmax import RowLoss
from dist_dml.metric_parameters import MetricParameters
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in READS),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"similarity": "cosine", "scale": 1e4}),
    ("l1", {"sums": "sweep"}),
    *(("l2", {"p": p, "sums": "sweep"}) for p in (0.99, 0.9, 0.5, 0.1, 0.01)),
    ("l2", {"p": 0.9}),
    ("l2", {"p": 0.5, "k": 1.0, "similarity": "cosine", "scale": 1e4}),
    ("binary_cross_entropy", {"similarity": "cosine", "scale": 1e4}),
    ("combined_margin", {"angle_multiplier": 3.0}),
    ("sub_centre_arcface", {"centres": 1}),
]
IDS = [f"{name} {keys}" for name, keys in VARIANTS]


def one_step(config: LossConfig, batch: Batch) -> dict[str, Tensor]:
    """Loss and gradients of the real classifier in float32, in one process."""
    rows, num_classes = len(batch.labels), len(batch.weight)
    partition = ClassPartition.of_worker(0, 1, num_classes)
    classifier = ClassParallelClassifier(
        batch.embeddings.shape[1],
        partition,
        config,
        OptimizerConfig(),
        seed=0,
        max_rows=rows,
        class_counts=batch.counts,
    )
    with torch.no_grad():
        classifier.weight.copy_(batch.weight)
        if classifier.bias is not None:
            classifier.bias.copy_(batch.bias)
    embeddings = batch.embeddings.float().requires_grad_()
    loss = classifier(embeddings, batch.labels, (rows,), rows).loss
    loss.backward()
    assert embeddings.grad is not None
    assert classifier.weight.grad is not None
    result = {"loss": loss.detach(), "embeddings": embeddings.grad}
    result["weight"] = classifier.weight.grad
    if classifier.bias is not None and classifier.bias.grad is not None:
        result["bias"] = classifier.bias.grad
    return result


@pytest.mark.parametrize(("name", "keys"), VARIANTS, ids=IDS)
def test_all_is_finite_at_logits_of_1e4_and_where_cosines_have_no_derivative(
    name: Any, keys: dict[str, Any]
) -> None:
    if name in COSINE_LOSSES:
        keys = {"scale": 1e4, **keys}
    config = LossConfig(name=name, tile_mebibytes=1.0, **keys)
    batch = random_batch(12, 500, 8, config.num_centres, logit_size=1e4)
    whole = one_step(config, batch)
    # Rows on their own and on other classes' weights, opposite ones, none; weights that are 0.
    weight = batch.weight.view(500, -1, 8)[:, 0]
    batch.embeddings[0] = weight[batch.labels[0]]
    batch.embeddings[1] = -weight[batch.labels[1]]
    batch.embeddings[2] = weight[batch.labels[2] + 1]
    batch.embeddings[3] = 0.0
    batch.weight[10:20] = 0.0
    batch.weight[20:40] = batch.weight[40:60]
    for results in (whole, one_step(config, batch)):
        for key, value in results.items():
            assert value.isfinite().all(), key


# Most that float32 and bfloat16 tiles may be off float64: of the loss, and of the gradients of
# embeddings and class weights (relative, in the norm of all). About twice what was measured over
# four seeds on a CPU, which rounds each product once more than CUDA. A cosine is rounded by 2^-9 at
# most, so large scales cost most; errors of rows largely cancel in the loss.
FLOAT32 = (3e-7, 3e-6)
BFLOAT16: dict[str, tuple[float, float]] = {
    "cross_entropy": (6e-4, 8e-3),
    "normalised_softmax": (2e-4, 8e-3),
    "balanced_softmax": (6e-4, 8e-3),
    "cosface": (3e-4, 3e-2),
    "arcface": (4e-4, 3e-2),
    "combined_margin": (1.3e-3, 3e-2),
    "sub_centre_arcface": (6e-4, 3.5e-2),
    "dynamic_arcface": (6e-4, 3e-2),
    "adaface": (3e-4, 3e-2),
    "l1": (7e-4, 9e-3),
    "l2": (8e-4, 2e-2),
    "binary_cross_entropy": (2e-4, 1.4e-2),
    "proxy_nca": (2e-4, 8e-3),
    "proxy_anchor": (2e-4, 8e-3),
    "soft_triple": (1.5e-3, 1.4e-2),
}


@pytest.mark.parametrize("tile_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "keys"), VARIANTS, ids=IDS)
def test_tiles_are_off_float64_by_less_than_the_table_says(
    name: Any, keys: dict[str, Any], tile_dtype: Any
) -> None:
    keys = {key: value for key, value in keys.items() if value != 1e4}
    config = LossConfig(name=name, tile_dtype=tile_dtype, tile_mebibytes=1.0, **keys)
    batch = random_batch(32, 2000, 64, config.num_centres)
    got, twin = one_step(config, batch), dense(config, batch, NormState())
    of_loss, of_gradients = FLOAT32 if tile_dtype == "float32" else BFLOAT16[name]
    assert abs(got["loss"] / twin.loss - 1) < of_loss
    for key in ("embeddings", "weight"):
        wanted = twin.gradients[key]
        error = ((got[key] - wanted).norm() / wanted.norm()).item()
        assert error < of_gradients, key
        # The tiles are rounded if, and only if, they shall be.
        assert (error > 1e-4) == (tile_dtype == "bfloat16"), key


MILLION = 1_000_000
ROWS = torch.tensor([0, MILLION - 1, 123_456])


def million() -> Tensor:
    """Flat; right; 40 hard rivals above the label. Float32, of which the twin takes the values."""
    spread = torch.tensor([[0.1], [3.0], [3.0]])
    logits = spread * torch.randn(3, MILLION, generator=torch.Generator().manual_seed(0))
    logits[1, ROWS[1]] = 30.0
    logits[2, 50:90] = 20.0
    logits[2, ROWS[2]] = 19.0
    return logits


def dense_rows(logits: Tensor, labels: Tensor, name: str, p: float) -> Tensor:
    if name == "metric":
        return metric_loss(logits, labels, 1.0, p)
    if name == "binary":
        one_hot = F.one_hot(labels, logits.shape[1]).double()
        return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)
    smoothing = 0.1 if name == "smoothed" else 0.0
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("loss", "name", "p"),
    [
        (CrossEntropy(MILLION), "plain", 1.0),
        (CrossEntropy(MILLION, 0.1, "all"), "smoothed", 1.0),
        (BinaryCrossEntropy(), "binary", 1.0),
        *((MetricSoftmax(MetricParameters(1.0, p), True), "metric", p) for p in (1.0, 0.99, 0.9)),
        *((MetricSoftmax(MetricParameters(1.0, p)), "metric", p) for p in (1.0, 0.9, 0.5, 0.1)),
    ],
    ids=str,
)
def test_a_million_classes_in_float32_are_as_exact_as_a_few(
    loss: RowLoss, name: str, p: float
) -> None:
    logits = million()
    leaf = logits.double().requires_grad_()
    wanted = dense_rows(leaf, ROWS, name, p)
    wanted.sum().backward()
    # Tiles of uneven size, merged.
    got = in_tiles(loss, logits, ROWS, (0, 400_000, 999_999, MILLION))
    torch.testing.assert_close(got.values.double(), wanted.detach(), rtol=2e-6, atol=0)
    assert leaf.grad is not None
    size = leaf.grad.abs().amax(1)
    assert ((got.gradient - leaf.grad).abs().amax(1) / size).max() < 3e-6


@pytest.mark.parametrize(
    ("loss", "name", "p"),
    [
        (CrossEntropy(200), "plain", 1.0),
        (CrossEntropy(200, 0.1, "all"), "smoothed", 1.0),
        (MetricSoftmax(MetricParameters(1.0, 1.0), True), "metric", 1.0),
        (MetricSoftmax(MetricParameters(1.0, 0.9), True), "metric", 0.9),
        (MetricSoftmax(MetricParameters(1.0, 0.5)), "metric", 0.5),
    ],
    ids=str,
)
def test_a_common_offset_of_1e4_costs_no_digits_in_float32(
    loss: RowLoss, name: str, p: float
) -> None:
    # A logit of 1e4 + 1 is a float32 number to 1e-3; the differences of such numbers are exact, and
    # a log-sum-exp that is rounded to 5e-4 would be an error of 5e-4 in every probability.
    generator = torch.Generator().manual_seed(0)
    logits = 1e4 + 2 * torch.randn(3, 200, generator=generator)
    labels = torch.tensor([0, 199, 77])
    logits[1, 199] += 12.0
    leaf = logits.double().requires_grad_()
    wanted = dense_rows(leaf, labels, name, p)
    wanted.sum().backward()
    got = in_tiles(loss, logits, labels, (0, 120, 200))
    torch.testing.assert_close(got.values.double(), wanted.detach(), rtol=2e-6, atol=0)
    assert leaf.grad is not None
    size = leaf.grad.abs().amax(1)
    assert ((got.gradient - leaf.grad).abs().amax(1) / size).max() < 3e-6
