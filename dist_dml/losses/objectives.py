"""From the configuration to a loss: which parts each `loss.name` puts together.

Dimensions: C classes of all workers, c of this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.loss_config import LossConfig
from dist_dml.losses.binary import BinaryCrossEntropy, prior_bias
from dist_dml.losses.composed import ComposedLoss, LargestCentre, Pooling, SoftCentre
from dist_dml.losses.cross_entropy import CrossEntropy
from dist_dml.losses.margins import AngularMargin, ClassMargin, Margin, dynamic_angles
from dist_dml.losses.metric_softmax import MetricSoftmax, power_sums_suffice
from dist_dml.losses.proxies import CentreSpread, ColumnLoss, ProxyAnchor
from dist_dml.losses.softmax import RowLoss

# Effective number of samples (Cui et al., CVPR 2019): b of (1 - b^n) / (1 - b).
_EFFECTIVE_BASE = 0.999


@dataclass(frozen=True)
class Objective:
    """A loss and what its class weights must be.

    Attributes:
        loss: of rows or of columns.
        scale: factor of the cosines, None for inner products.
        centres: rows of weights of each class.
        bias: starting value of the classes' bias, None without one.
        spread: a term on the centres of a class.
        adaptive: whether the margin follows the rows' norms (AdaFace).
    """

    loss: RowLoss | ColumnLoss
    scale: float | None
    centres: int = 1
    bias: float | None = None
    spread: CentreSpread | None = None
    adaptive: bool = False


def build_objective(
    config: LossConfig,
    num_classes: int,
    own: slice,
    class_counts: Int[Tensor, " C"] | None,
    dtype: torch.dtype = torch.float32,
) -> Objective:
    """The objective that `loss.name` names, for the worker that owns the classes `own`.

    Args:
        config: the loss section.
        num_classes: C.
        own: class ids of this worker.
        class_counts: training images of every class; needed by losses that follow them.
        dtype: of the class weights.

    Raises:
        UsageError: if the loss needs what is missing.
    """
    if num_classes < 2 and (config.label_smoothing > 0 or config.name not in ("cross_entropy",)):
        raise UsageError(
            f"loss.name={config.name} with {num_classes} class: needs at least 2 classes; train on "
            "more classes, or use cross_entropy without label_smoothing"
        )
    cosine = config.uses_cosine
    # ProxyNCA++ is a softmax of -scale * |x - w|^2 = 2 scale (cos - 1), whose constant cancels.
    scale = config.factor * (2 if config.name == "proxy_nca" else 1)
    bias = None
    if config.bias and not cosine:
        bias = prior_bias(num_classes) if config.name == "binary_cross_entropy" else 0.0
    counts = _counts(config, class_counts)
    weight = None
    if config.class_weights != "none":
        weight = class_weights(counts, config.class_weights)[own].to(dtype)
    if config.name == "proxy_anchor":
        if weight is not None:
            raise UsageError(
                "loss.class_weights weighs rows, and proxy_anchor sums over classes; set it to none"
            )
        anchor = ProxyAnchor(num_classes, scale * config.setting("cosine_margin"))
        return Objective(anchor, scale)
    parts = ComposedLoss(
        _base(config, num_classes, dtype),
        scale if cosine else 1.0,
        _pooling(config, scale),
        _margin(config, counts, own, dtype),
        _log_prior(counts)[own].to(dtype) if config.name == "balanced_softmax" else None,
        weight,
    )
    bare = parts.pooling is parts.margin is parts.log_prior is parts.class_weight is None
    adaptive = config.name == "adaface"
    loss = parts.base if bare and not adaptive else parts
    spread = None
    if config.name == "soft_triple" and config.centre_spread > 0:
        spread = CentreSpread(num_classes, config.centre_spread)
    return Objective(loss, scale if cosine else None, config.num_centres, bias, spread, adaptive)


def _base(config: LossConfig, num_classes: int, dtype: torch.dtype) -> RowLoss:
    if config.name in ("l1", "l2"):
        parameters = config.metric_parameters
        suffice = power_sums_suffice(parameters.p) and dtype != torch.float64
        return MetricSoftmax(
            parameters, {"auto": suffice, "powers": True, "sweep": False}[config.sums]
        )
    if config.name == "binary_cross_entropy":
        return BinaryCrossEntropy()
    return CrossEntropy(num_classes, config.label_smoothing, config.smoothing)


def _pooling(config: LossConfig, scale: float) -> Pooling | None:
    if config.num_centres == 1:
        return None
    if config.name == "soft_triple":
        return SoftCentre(config.num_centres, 1 / (config.centre_temperature * scale))
    return LargestCentre(config.num_centres)


def _margin(config: LossConfig, counts: Tensor, own: slice, dtype: torch.dtype) -> Margin | None:
    def of(key: str) -> float:
        return float(config.setting(key) or 0.0)

    build: dict[str, Callable[[], Margin]] = {
        "cosface": lambda: AngularMargin(cosine=of("cosine_margin")),
        "soft_triple": lambda: AngularMargin(cosine=of("cosine_margin")),
        "arcface": lambda: AngularMargin(angle=of("angle_margin")),
        "sub_centre_arcface": lambda: AngularMargin(angle=of("angle_margin")),
        "combined_margin": lambda: AngularMargin(
            float(config.setting("angle_multiplier")), of("angle_margin"), of("cosine_margin")
        ),
        # Neutral, and of rows like those of each batch, which take its place.
        "adaface": lambda: AngularMargin(angle=torch.zeros(1, dtype=dtype)),
        "dynamic_arcface": lambda: ClassMargin(
            dynamic_angles(counts[own], *config.dynamic_margin).to(dtype)
        ),
    }
    return build[config.name]() if config.name in build else None


def _counts(config: LossConfig, class_counts: Tensor | None) -> Int[Tensor, " C"]:
    """The counts, checked, if the loss follows them."""
    follows = config.name in ("balanced_softmax", "dynamic_arcface")
    if not follows and config.class_weights == "none":
        return torch.empty(0, dtype=torch.int64)
    if class_counts is None:
        raise UsageError(
            f"loss.name={config.name} with loss.class_weights={config.class_weights} needs the "
            "number of training images of each class; pass class_counts"
        )
    empty = int((class_counts == 0).sum())
    if empty and config.name == "balanced_softmax":
        raise UsageError(
            f"loss.name=balanced_softmax: {empty} of {len(class_counts)} classes have no training "
            "image, hence a prior of 0; lower data.num_classes or use another loss"
        )
    return class_counts


def _log_prior(counts: Int[Tensor, " C"]) -> Float[Tensor, " C"]:
    """log(n_j / N) of balanced softmax (Ren et al., NeurIPS 2020)."""
    return (counts.double() / counts.sum()).log()


def class_weights(counts: Int[Tensor, " C"], kind: str) -> Float[Tensor, " C"]:
    """Factors of the rows of each class whose mean over the training images is 1.

    Args:
        counts: training images of each class.
        kind: `inverse` (1 / n) or `effective` ((1 - b) / (1 - b^n), b = 0.999).
    """
    numbers = counts.clamp_min(1).double()
    if kind == "inverse":
        weights = 1 / numbers
    else:
        weights = (1 - _EFFECTIVE_BASE) / (1 - _EFFECTIVE_BASE**numbers)
    return weights * counts.sum() / (weights * counts).sum()
