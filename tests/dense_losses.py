"""Dense float64 twins of all objectives: full rows of logits, plain PyTorch, autograd.

Written from the papers' formulas, not from `dist_dml.losses`, whose functions they check. L1 and L2
lose digits where a probability is near 1: twins of those rows are in `metric_softmax_twin`.

Dimensions: R rows, C classes, K centres of a class, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_dml.loss_config import LossConfig


@dataclass(frozen=True)
class Batch:
    """All rows and all classes of a problem; `counts` are training images of each class."""

    embeddings: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor
    counts: Tensor
    row_weights: Tensor | None = None


@dataclass
class NormState:
    """AdaFace's running mean and standard deviation of norms, from the starts of its code."""

    mean: float = 20.0
    deviation: float = 100.0


@dataclass(frozen=True)
class Dense:
    """What a twin gives: the loss, rows that are right, gradients by name."""

    loss: Tensor
    num_correct: int
    gradients: dict[str, Tensor] = field(default_factory=dict)


def random_batch(
    num_rows: int,
    num_classes: int,
    num_features: int,
    centres: int = 1,
    logit_size: float = 1.0,
    seed: int = 0,
) -> Batch:
    """Float64, with inner products of about `logit_size`; norms of rows differ, as AdaFace needs.

    The first and the last class have rows, one class has several, and the label's weight has
    drawn every second row towards it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    embeddings = normal(num_rows, num_features)
    weight = normal(num_classes, centres, num_features) / num_features**0.5 * logit_size
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    labels[:4] = torch.tensor([0, num_classes - 1, 3, 3])
    drawn_to = F.normalize(weight[labels[::2], 0], dim=1)
    embeddings[::2] += 2 * num_features**0.5 * drawn_to
    embeddings *= torch.linspace(0.5, 1.5, num_rows, dtype=torch.float64)[:, None]
    counts = torch.randint(1, 500, (num_classes,), generator=generator)
    weight = weight[:, 0] if centres == 1 else weight
    return Batch(embeddings, labels, weight, normal(num_classes), counts)


def dense(config: LossConfig, batch: Batch, norms: NormState | None = None) -> Dense:
    """Loss of a batch, `(row_weights * loss).sum() / R`, with gradients; see the module's text."""
    leaves = {
        name: getattr(batch, name).clone().requires_grad_()
        for name in ("embeddings", "weight", "bias")
    }
    given = replace(batch, **leaves)
    counted = batch.labels != config.ignore_index
    logits, scale = similarities(config, given)
    labels = batch.labels.where(counted, 0)
    num_correct = int(((logits.argmax(1) == labels) & counted).sum())
    if config.name == "proxy_anchor":
        margin = 0.1 if config.cosine_margin is None else config.cosine_margin
        loss = proxy_anchor(logits[counted] / scale, labels[counted], scale, margin)
    else:
        values = row_values(config, logits, scale, replace(given, labels=labels), norms)
        weights = counted.double() * (1.0 if batch.row_weights is None else batch.row_weights)
        loss = (values * weights * class_factors(config, batch.counts)[labels]).mean()
        if config.name == "soft_triple":
            loss = loss + centre_spread(given.weight, config.centre_spread)
    loss.backward()
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }
    return Dense(loss.detach(), num_correct, gradients)


def similarities(config: LossConfig, batch: Batch) -> tuple[Tensor, float]:
    """The classes' logits (R, C) without margin, and the factor of the cosines."""
    own = {"soft_triple": 20.0, "proxy_anchor": 32.0, "proxy_nca": 9.0}
    margins = ("cosface", "arcface", "combined_margin", "sub_centre_arcface", "dynamic_arcface")
    own |= dict.fromkeys((*margins, "adaface"), 64.0)
    scale = config.scale or own.get(config.name, 16.0)
    if config.temperature is not None:
        scale = 1 / config.temperature
    if not (config.similarity == "cosine" or config.name in own | {"normalised_softmax": 0}):
        logits = batch.embeddings @ batch.weight.T
        logits = logits + batch.bias if config.bias else logits
    else:
        rows, columns = F.normalize(batch.embeddings, dim=1), F.normalize(batch.weight, dim=-1)
        if config.name == "proxy_nca":
            # Squared distances of unit vectors, as its code: a constant off from 2 * cosine.
            logits = -scale * torch.cdist(rows[None], columns[None])[0].square()
        elif columns.ndim == 2:
            logits = scale * rows @ columns.T
        else:
            cosines = torch.einsum("rd,ckd->rck", rows, columns)
            if config.name == "soft_triple":
                shares = (cosines / config.centre_temperature).softmax(2)
                logits = scale * (shares * cosines).sum(2)
            else:
                logits = scale * cosines.max(2).values
    if config.name == "balanced_softmax":
        logits = logits + (batch.counts.double() / batch.counts.sum()).log()
    return logits, scale


def row_values(
    config: LossConfig, logits: Tensor, scale: float, batch: Batch, norms: NormState | None
) -> Tensor:
    """The loss of each row (R,)."""
    labels = batch.labels
    if config.name in ("l1", "l2"):
        if config.name == "l1":
            return metric_loss(logits, labels, 1.0, 1.0)
        offset = 1e-6 if config.a is None else config.a
        return metric_loss(logits, labels, config.k or 1 / (1 + offset), config.p)
    one_hot = F.one_hot(labels, logits.shape[1]).double()
    if config.name == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)
    logits = with_margin(config, logits, one_hot, scale, batch, norms)
    smoothed, e, num_classes = one_hot, config.label_smoothing, logits.shape[1]
    if e > 0 and config.smoothing == "all":
        return F.cross_entropy(logits, labels, label_smoothing=e, reduction="none")
    if e > 0:
        smoothed = one_hot * (1 - e) + (1 - one_hot) * e / (num_classes - 1)
    return -(smoothed * logits.log_softmax(1)).sum(1)


def metric_loss(logits: Tensor, labels: Tensor, k: float, p: float) -> Tensor:
    """Paper A, (16): -(1/p) sum_i log(1 - k |q_i - y_i|^p).

    Where q_y is small, 1 - k (1 - q_y)^p is 1 - k - k expm1(p log(1 - q_y)). A rival's q near 1
    still loses digits.
    """
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    shares = logits.softmax(1)
    own, wrong = (shares * is_label).sum(1), (shares * ~is_label).sum(1)
    log_wrong = torch.where(wrong < 0.5, wrong.clamp_min(1e-300).log(), torch.log1p(-own))
    of_label = (1 - k - k * torch.expm1(p * log_wrong)).log()
    of_others = torch.log1p(-k * shares.masked_fill(is_label, 0) ** p).sum(1)
    return -(of_label + of_others) / p


def with_margin(
    config: LossConfig,
    logits: Tensor,
    one_hot: Tensor,
    scale: float,
    batch: Batch,
    norms: NormState | None,
) -> Tensor:
    """The logits, the label's replaced by scale * (cos(m1 t + m2) - m3)."""
    m1, m3 = 1.0, 0.0
    m2 = torch.zeros(len(logits), dtype=torch.float64)
    if config.name in ("cosface", "soft_triple"):
        own = {"cosface": 0.4, "soft_triple": 0.01}[config.name]
        return logits - scale * one_hot * (
            own if config.cosine_margin is None else config.cosine_margin
        )
    if config.name in ("arcface", "sub_centre_arcface"):
        m2 = m2 + (0.5 if config.angle_margin is None else config.angle_margin)
    elif config.name == "combined_margin":
        m1 = config.angle_multiplier or 1.0
        m2 = m2 + (0.3 if config.angle_margin is None else config.angle_margin)
        m3 = 0.2 if config.cosine_margin is None else config.cosine_margin
    elif config.name == "dynamic_arcface":
        a, b, exponent = config.dynamic_margin
        m2 = a * batch.counts[batch.labels].double() ** -exponent + b
    elif config.name == "adaface":
        assert norms is not None
        return adaface(config, logits, one_hot, scale, batch, norms)
    else:
        return logits
    cosine = (logits * one_hot).sum(1) / scale
    angle = m1 * torch.acos(cosine) + m2
    if m1 > 1:  # SphereFace's continuation, which falls on beyond pi.
        turns = (angle / math.pi).floor()
        changed = torch.where(turns % 2 == 0, 1.0, -1.0) * angle.cos() - 2 * turns
    else:
        changed = torch.where(angle > math.pi, cosine - m2 * m2.sin(), angle.cos())
    return torch.where(one_hot == 1, scale * (changed - m3)[:, None], logits)


def adaface(
    config: LossConfig,
    logits: Tensor,
    one_hot: Tensor,
    scale: float,
    batch: Batch,
    norms: NormState,
) -> Tensor:
    """Kim et al., eqs. 14-16, as their code: statistics first, then the margins of this batch."""
    margin = 0.4 if config.angle_margin is None else config.angle_margin
    lengths = batch.embeddings.detach().norm(dim=1).clamp(0.001, 100)
    t = config.norm_momentum
    norms.mean = t * lengths.mean().item() + (1 - t) * norms.mean
    norms.deviation = t * lengths.std().item() + (1 - t) * norms.deviation
    z = (lengths - norms.mean) / (norms.deviation + 1e-3) * config.norm_concentration
    z = z.clamp(-1, 1)
    cosine = (logits * one_hot).sum(1) / scale
    angle = (torch.acos(cosine) - margin * z).clamp(0, math.pi)
    changed = angle.cos() - (margin + margin * z)
    return torch.where(one_hot == 1, scale * changed[:, None], logits)


def proxy_anchor(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Kim et al. 2020, eq. 4, class by class."""
    num_classes = cosines.shape[1]
    pulls, pushes = [], []
    for j in range(num_classes):
        own = cosines[labels == j, j]
        if len(own):
            pulls.append(torch.log(1 + torch.exp(-scale * (own - margin)).sum()))
        pushes.append(torch.log(1 + torch.exp(scale * (cosines[labels != j, j] + margin)).sum()))
    return torch.stack(pulls).mean() + torch.stack(pushes).mean()


def centre_spread(weight: Tensor, tau: float) -> Tensor:
    """Qian et al. 2019, eq. 11, over pairs of centres."""
    num_classes, centres, _ = weight.shape
    unit, total = F.normalize(weight, dim=2), weight.new_zeros(())
    for s in range(centres):
        for t in range(s + 1, centres):
            total = total + (2 + 1e-5 - 2 * (unit[:, s] * unit[:, t]).sum(1)).sqrt().sum()
    return tau * total / (num_classes * centres * (centres - 1))


def class_factors(config: LossConfig, counts: Tensor) -> Tensor:
    """Weight of each class's rows; the mean over training images is 1."""
    n = counts.double()
    if config.class_weights == "none":
        return torch.ones_like(n)
    raw = 1 / n if config.class_weights == "inverse" else 0.001 / (1 - 0.999**n)
    return raw / ((raw * n).sum() / n.sum())
