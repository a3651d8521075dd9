"""Dense float64 twin of the kernels' contract (`dist_dml.parallel.class_sweeps`).

Written from the formulas there, independent of the package but for its data classes. Where
`operand_dtype` rounds, the twin rounds rows and weights before the logits' product, as kernels do,
and nothing else; norms are those of the unrounded weights. What kernels round besides (the
exponentials and gradients as operands of further products) is what the tests' tolerances are for.

Dimensions: R or N rows, c classes, n of them that take part, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dist_dml.parallel.class_sweeps import (
    SMALLEST_NORM,
    ClassStep,
    KernelClasses,
    RowCoefficients,
    SoftmaxSums,
)

# What `rival` is where a row has no other class.
NO_RIVAL = torch.finfo(torch.float32).min / 4


class DenseGradient(NamedTuple):
    """Gradients, or bounds of their rounding: of weights (n, D), biases (n,) and rows (N, D)."""

    weight: Tensor
    bias: Tensor
    row: Tensor


def participating(classes: KernelClasses) -> Tensor:
    """The weights (n, D) of the classes that take part, float64."""
    weight = classes.weight if classes.active is None else classes.weight[classes.active]
    return weight.double()


def factors(classes: KernelClasses) -> Tensor:
    """f (n,): scale / |w| for cosines, else 1."""
    weight = participating(classes)
    if classes.scale is None:
        return torch.ones(len(weight), dtype=torch.float64)
    return classes.scale / weight.norm(dim=1).clamp_min(SMALLEST_NORM)


def dense_logits(rows: Tensor, classes: KernelClasses) -> Tensor:
    """s (R, n)."""
    rounded = participating(classes).to(classes.operand_dtype).double()
    logits = rows.to(classes.operand_dtype).double() @ rounded.T * factors(classes)
    return logits if classes.bias is None else logits + classes.bias.double()


def labels_of(columns: Tensor, num_classes: int) -> Tensor:
    """(R, n): whether a class is the row's label."""
    return columns[:, None] == torch.arange(num_classes)


def dense_forward(
    rows: Tensor, columns: Tensor, classes: KernelClasses, with_gap: bool
) -> SoftmaxSums:
    """The forward sweep, `pull` always given."""
    logits = dense_logits(rows, classes)
    is_label = labels_of(columns, logits.shape[1])
    others = logits.masked_fill(is_label, float("-inf"))
    rival = others.amax(1).clamp_min(NO_RIVAL)
    exponentials = (others - rival[:, None]).exp()
    gap = torch.zeros_like(rival)
    if with_gap:
        gap = (rival[:, None] - logits).masked_fill(is_label, 0.0).sum(1)
    label = logits.masked_fill(~is_label, float("-inf")).amax(1)
    pull = exponentials @ (participating(classes) * factors(classes)[:, None])
    return SoftmaxSums(label, rival, exponentials.sum(1), gap, pull, None)


def logit_gradient(
    rows: Tensor, columns: Tensor, coefficients: RowCoefficients, classes: KernelClasses
) -> tuple[Tensor, Tensor]:
    """G (N, n), and the sum of the absolute values of what each entry is a sum of."""
    normaliser, factor, offset, label = (part.double()[:, None] for part in coefficients)
    other = factor * (dense_logits(rows, classes) - normaliser).exp()
    is_label = labels_of(columns, other.shape[1])
    size = torch.where(is_label, label.abs(), other.abs() + offset.abs())
    return torch.where(is_label, label, other - offset), size


def dense_gradient(
    rows: Tensor, columns: Tensor, coefficients: RowCoefficients, classes: KernelClasses
) -> DenseGradient:
    """Of the weights of participating classes (n, D), their biases (n,) and the rows (N, D)."""
    gradient, _ = logit_gradient(rows, columns, coefficients, classes)
    weight, factor = participating(classes), factors(classes)[:, None]
    of_weight = gradient.T @ rows.double()
    if classes.scale is not None:
        along = (of_weight * weight).sum(1, keepdim=True)
        square = weight.square().sum(1, keepdim=True).clamp_min(SMALLEST_NORM**2)
        of_weight = factor * (of_weight - along * weight / square)
    return DenseGradient(of_weight, gradient.sum(0), gradient @ (factor * weight))


def gradient_bound(
    rows: Tensor, columns: Tensor, coefficients: RowCoefficients, classes: KernelClasses
) -> DenseGradient:
    """Elementwise: a relative error e of every G_ij, z_i and w_j changes gradients by e times
    this."""
    _, size = logit_gradient(rows, columns, coefficients, classes)
    weight, factor = participating(classes).abs(), factors(classes)[:, None]
    of_weight = size.T @ rows.double().abs()
    if classes.scale is not None:
        along = (of_weight * weight).sum(1, keepdim=True)
        square = weight.square().sum(1, keepdim=True).clamp_min(SMALLEST_NORM**2)
        of_weight = factor * (of_weight + along * weight / square)
    return DenseGradient(of_weight, size.sum(0), size @ (factor * weight))


def _mix(x: Tensor) -> Tensor:
    """32-bit arithmetic in int64: products wrap round, which leaves the lower 32 bits right."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_bits(step: ClassStep, local: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """16 bits each (len(local), D) for the weights and for the momentum."""
    ids = local.long() + step.first_class
    row = _mix(torch.tensor((step.seed ^ step.step) & 0xFFFFFFFF))
    row = _mix(_mix(row ^ (ids & 0xFFFFFFFF)) ^ ((ids >> 32) & 0xFFFFFFFF))
    bits = _mix(row[:, None] ^ torch.arange(num_features))
    return bits & 0xFFFF, bits >> 16


def round_by_chance(x: Tensor, bits: Tensor) -> Tensor:
    """The bfloat16 below or above x."""
    whole = x.float().view(torch.int32).long() + bits
    # Back to signed 32 bits: the weight 2^31 of the sign bit is negative there.
    whole = whole & 0xFFFF0000
    signed = torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)
    return signed.view(torch.float32).to(torch.bfloat16)


def _stored(x: Tensor, dtype: torch.dtype, step: ClassStep, bits: Tensor) -> Tensor:
    if dtype == torch.bfloat16 and step.rounding == "stochastic":
        return round_by_chance(x, bits)
    # By way of float32, in which updates are defined, unless the twin itself runs in float64.
    return x if dtype == torch.float64 else x.float().to(dtype)


def _change(
    weight: Tensor, gradient: Tensor, state: Mapping[str, Tensor], step: ClassStep
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is subtracted from the rows of weights, and their new state, float64, not rounded."""
    if step.clip_norm > 0:
        norm = gradient.norm(dim=1, keepdim=True)
        gradient = torch.where(norm > step.clip_norm, gradient * (step.clip_norm / norm), gradient)
    rate, decay, t = step.learning_rate, step.weight_decay, step.step
    if step.kind != "adamw":
        gradient = gradient + decay * weight
    if step.kind == "sgd":
        if step.momentum == 0:
            return rate * gradient, {}
        buffer = step.momentum * state["momentum_buffer"] + gradient if t > 1 else gradient
        ahead = gradient + step.momentum * buffer if step.nesterov else buffer
        return rate * ahead, {"momentum_buffer": buffer}
    if step.kind == "adagrad":
        total = state["sum"] + gradient.square().mean(1)
        return rate * gradient / (total.sqrt() + step.epsilon)[:, None], {"sum": total}
    beta, beta_sq = step.betas
    mean = beta * state["exp_avg"] + (1 - beta) * gradient
    square = beta_sq * state["exp_avg_sq"] + (1 - beta_sq) * gradient.square()
    root = (square / (1 - beta_sq**t)).sqrt()
    change = rate * (mean / (1 - beta**t)) / (root + step.epsilon)
    if step.kind == "adamw":
        change = change + rate * decay * weight
    return change, {"exp_avg": mean, "exp_avg_sq": square}


def dense_update(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    step: ClassStep,
    active: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One update of the rows `active` (all if None), whose gradients (n, D) are given.

    Returns new tensors in the dtypes of the old ones; weights may be float64, to check the twin
    itself. Decay reads the stored weights; an update reads the moments before they are rounded.
    """
    ids = torch.arange(len(weight)) if active is None else active
    old = weight[ids].double()
    rows = {key: value[ids].double() for key, value in state.items()}
    change, new_rows = _change(old, gradient.double(), rows, step)
    of_weight, of_moment = random_bits(step, ids, weight.shape[1])
    new_weight, new_state = weight.clone(), {key: value.clone() for key, value in state.items()}
    for key, value in new_rows.items():
        if key in ("momentum_buffer", "exp_avg"):
            value = _stored(value, state[key].dtype, step, of_moment)
        new_state[key][ids] = value.to(state[key].dtype)
    if step.rounding == "kahan":
        exact = (old + rows["compensation"] - change).float()
        new_weight[ids] = exact.to(weight.dtype)
        new_state["compensation"][ids] = (exact - new_weight[ids].float()).to(torch.bfloat16)
    else:
        new_weight[ids] = _stored(old - change, weight.dtype, step, of_weight).to(weight.dtype)
    return new_weight, new_state
