"""Objectives equal pytorch-metric-learning's of the same name, where that library has them.

It keeps weights as (D, C) for the margin losses, class by class and centre by centre, and ArcFace's
margins in degrees. All of its losses are means over the rows of a batch.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dense_losses import Batch, random_batch
from torch import Tensor

from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier

losses = pytest.importorskip("pytorch_metric_learning.losses")

C, D, R = 37, 8, 22
SIZES = {"num_classes": C, "embedding_size": D}


def own(batch: Batch, name: Any, **keys: Any) -> dict[str, Tensor]:
    """Our loss with gradients, the weights' as (C * K, D)."""
    config = LossConfig(name=name, **keys)
    partition = ClassPartition.of_worker(0, 1, C)
    classifier = ClassParallelClassifier(
        D, partition, config, OptimizerConfig(), 0, R, dtype=torch.float64
    )
    with torch.no_grad():
        classifier.weight.copy_(batch.weight)
    rows = batch.embeddings.clone().requires_grad_()
    loss = classifier(rows, batch.labels, (R,), R).loss
    loss.backward()
    assert rows.grad is not None
    assert classifier.weight.grad is not None
    weight = classifier.weight.grad.reshape(-1, D)
    return {"loss": loss.detach(), "embeddings": rows.grad, "weight": weight}


def theirs(batch: Batch, loss: Any, parameter: str, transposed: bool) -> dict[str, Tensor]:
    weight = batch.weight.reshape(-1, D)
    proxies = getattr(loss, parameter)
    proxies.data = (weight.T if transposed else weight).contiguous().clone()
    rows = batch.embeddings.clone().requires_grad_()
    value = loss(rows, batch.labels)
    value.backward()
    assert rows.grad is not None
    gradient = proxies.grad.T if transposed else proxies.grad
    return {"loss": value.detach(), "embeddings": rows.grad, "weight": gradient}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for key, value in wanted.items():
        torch.testing.assert_close(
            got[key], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("margin", [0.5, 1.5])
def test_arcface(margin: float) -> None:
    batch = random_batch(R, C, D)
    peer = losses.ArcFaceLoss(**SIZES, margin=math.degrees(margin), scale=20.0)
    got = own(batch, "arcface", angle_margin=margin, scale=20.0)
    assert_equal(got, theirs(batch, peer, "W", transposed=True))


def test_cosface() -> None:
    batch = random_batch(R, C, D)
    peer = losses.CosFaceLoss(**SIZES, margin=0.35, scale=20.0)
    got = own(batch, "cosface", cosine_margin=0.35, scale=20.0)
    assert_equal(got, theirs(batch, peer, "W", transposed=True))


def test_sub_centre_arcface() -> None:
    batch = random_batch(R, C, D, centres=3)
    peer = losses.SubCenterArcFaceLoss(**SIZES, margin=math.degrees(0.5), scale=20.0, sub_centers=3)
    got = own(batch, "sub_centre_arcface", angle_margin=0.5, scale=20.0, centres=3)
    assert_equal(got, theirs(batch, peer, "W", transposed=True))


# Theirs makes a tensor of NumPy's binomials.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_sphereface_is_the_combined_margin_with_a_multiplier() -> None:
    # Theirs multiplies the logits by the rows' lengths: unit rows make them equal.
    batch = random_batch(R, C, D)
    unit = batch.embeddings / batch.embeddings.norm(dim=1, keepdim=True)
    batch.embeddings.copy_(unit)
    peer = losses.SphereFaceLoss(**SIZES, margin=3, scale=20.0)
    got = own(
        batch,
        "combined_margin",
        angle_multiplier=3.0,
        angle_margin=0.0,
        cosine_margin=0.0,
        scale=20.0,
    )
    wanted = theirs(batch, peer, "W", transposed=True)
    # The gradient of its rows has a part along the row, from the length.
    for key in ("loss", "weight"):
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-9, atol=1e-12)


def test_normalised_softmax() -> None:
    batch = random_batch(R, C, D)
    # Theirs normalises the rows in its default distance.
    peer = losses.NormalizedSoftmaxLoss(**SIZES, temperature=0.05)
    got = own(batch, "normalised_softmax", temperature=0.05)
    assert_equal(got, theirs(batch, peer, "W", transposed=True))


def test_proxy_nca_of_squared_distances() -> None:
    # Theirs keeps the scale 1 of the first paper; ProxyNCA++'s temperature is `softmax_scale`.
    batch = random_batch(R, C, D)
    peer = losses.ProxyNCALoss(**SIZES, softmax_scale=9.0)
    got = own(batch, "proxy_nca", scale=9.0)
    assert_equal(got, theirs(batch, peer, "proxies", transposed=False))


def test_proxy_anchor() -> None:
    batch = random_batch(R, C, D)
    peer = losses.ProxyAnchorLoss(**SIZES, margin=0.1, alpha=32)
    got = own(batch, "proxy_anchor")
    assert_equal(got, theirs(batch, peer, "proxies", transposed=False))


def test_soft_triple_without_the_term_on_centres() -> None:
    # Theirs leaves that term to a weight regulariser, `SparseCentersRegularizer`.
    batch = random_batch(R, C, D, centres=4)
    peer = losses.SoftTripleLoss(**SIZES, centers_per_class=4, la=20, gamma=0.1, margin=0.01)
    got = own(batch, "soft_triple", centres=4, centre_spread=0.0)
    assert_equal(got, theirs(batch, peer, "fc", transposed=True))


def test_soft_triple_with_the_term_on_centres() -> None:
    from pytorch_metric_learning.regularizers import SparseCentersRegularizer

    batch = random_batch(R, C, D, centres=4)
    peer = losses.SoftTripleLoss(
        **SIZES,
        centers_per_class=4,
        weight_regularizer=SparseCentersRegularizer(C, 4),
        weight_reg_weight=0.2,
    )
    got = own(batch, "soft_triple", centres=4, centre_spread=0.2)
    wanted = theirs(batch, peer, "fc", transposed=True)
    # The authors' 1e-5 below the root is 1e-7 in theirs.
    torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-6, atol=0)
