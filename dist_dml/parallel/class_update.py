"""`ClassStep` in torch operations: the update of some rows of class weights from their gradient.

The reference of the kernels' updates, and what the torch backend runs tile by tile. Elementwise but
for the norms of rows, so the temporaries have the size of a tile.

Dimensions: t rows of weights (of one tile), D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.parallel.class_sweeps import ClassStep, UpdateTarget

_LOW_32 = 0xFFFFFFFF


def state_names(step: ClassStep, weight_dtype: torch.dtype) -> tuple[str, ...]:
    """The tensors of state that a rule keeps beside weights of a dtype."""
    names = {
        "sgd": ("momentum_buffer",) if step.momentum else (),
        "adam": ("exp_avg", "exp_avg_sq"),
        "adamw": ("exp_avg", "exp_avg_sq"),
        "adagrad": ("sum",),
    }[step.kind]
    kahan = weight_dtype == torch.bfloat16 and step.rounding == "kahan"
    return (*names, "compensation") if kahan else names


def update_rows_(
    weight: Tensor,
    gradient: Float[Tensor, "t D"],
    state: Mapping[str, Tensor],
    step: ClassStep,
    class_ids: Int[Tensor, " t"],
) -> None:
    """Update `weight` (t, D) and the same rows of `state`, in place; see `ClassStep`.

    Equal to `torch.optim`'s SGD, Adam and AdamW for float32 weights. Overwrites `gradient`, which
    has the dtype of all arithmetic.

    Args:
        weight: of any dtype; bfloat16 is rounded by `step.rounding`.
        gradient: dL/dw.
        state: `state_names`, each (t, D), `sum` (t,).
        step: the rule.
        class_ids: (t,) global ids, for stochastic rounding.
    """
    bits = None
    if step.rounding == "stochastic" and torch.bfloat16 in (
        weight.dtype,
        *(state[name].dtype for name in state),
    ):
        bits = _random_bits(step, class_ids, weight.shape[1])
    if step.clip_norm > 0:
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient.mul_((step.clip_norm / norm.clamp_min(1e-30)).clamp_max(1.0))
    plain = weight.dtype == gradient.dtype
    wide = weight if plain else weight.to(gradient.dtype)
    if step.kind == "adamw":
        wide = wide.mul_(1 - step.learning_rate * step.weight_decay)
    elif step.weight_decay:
        gradient.add_(wide, alpha=step.weight_decay)
    update = _DIRECTIONS[step.kind](gradient, state, step, bits)
    if plain:
        weight.add_(update, alpha=-step.learning_rate)
        return
    if step.rounding == "kahan":
        wide.add_(state["compensation"])
    wide.add_(update, alpha=-step.learning_rate)
    weight.copy_(_rounded(wide, None if bits is None else bits & 0xFFFF))
    if step.rounding == "kahan":
        state["compensation"].copy_(wide.sub_(weight))


def update_tile_(
    target: UpdateTarget,
    weight: Tensor,
    rows: slice | Int[Tensor, " t"],
    gradient: Float[Tensor, "t D"],
) -> None:
    """Update some rows of all weights and state in place, unless `target.apply` is false.

    The host reads `apply` on a CPU, where it lies; on CUDA the device chooses between old and new.

    Args:
        target: rule, state of all rows, whether to update.
        weight: (c, D), all rows.
        rows: those of the gradient.
        gradient: dL/dw; overwritten.
    """
    if not weight.is_cuda and not bool(target.apply):
        return
    tensors = [weight, *target.state.values()]
    # Sums over a row have one number a row, like the state of biases.
    wide = [
        tensor[:, None] if tensor.ndim == 1 and name != "sum" else tensor
        for name, tensor in zip(("weight", *target.state), tensors, strict=True)
    ]
    own = [tensor[rows] for tensor in wide]  # Views of a slice, copies for an index.
    before = [tensor.clone() for tensor in own] if weight.is_cuda else []
    if isinstance(rows, slice):
        ids = torch.arange(rows.start, rows.stop, device=weight.device)
    else:
        ids = rows
    state = dict(zip(target.state, own[1:], strict=True))
    update_rows_(own[0], gradient, state, target.step, ids + target.step.first_class)
    for new, old in zip(own, before, strict=False):
        new.copy_(torch.where(target.apply, new, old))
    if not isinstance(rows, slice):
        for tensor, new in zip(wide, own, strict=True):
            tensor[rows] = new


def _sgd(gradient: Tensor, state: Mapping[str, Tensor], step: ClassStep, bits: Tensor | None):
    if not step.momentum:
        return gradient
    moment = _moment(state["momentum_buffer"], gradient, step.momentum, 1.0, bits)
    return gradient.add_(moment, alpha=step.momentum) if step.nesterov else moment


def _adam(gradient: Tensor, state: Mapping[str, Tensor], step: ClassStep, bits: Tensor | None):
    first, second = step.betas
    moment = _moment(state["exp_avg"], gradient, first, 1 - first, bits)
    square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    scale = math.sqrt(1 - second**step.step)
    denominator = square.sqrt().div_(scale).add_(step.epsilon)
    return torch.div(moment, denominator, out=gradient).div_(1 - first**step.step)


def _adagrad(gradient: Tensor, state: Mapping[str, Tensor], step: ClassStep, bits: Tensor | None):
    total = state["sum"].add_(gradient.square().mean(1))
    return gradient.div_(total.sqrt().add_(step.epsilon)[:, None])


_DIRECTIONS = {"sgd": _sgd, "adam": _adam, "adamw": _adam, "adagrad": _adagrad}


def _moment(
    moment: Tensor, gradient: Tensor, decay: float, share: float, bits: Tensor | None
) -> Tensor:
    """decay * moment + share * gradient: stored in the moment's dtype, returned unrounded."""
    if moment.dtype == gradient.dtype:
        return moment.mul_(decay).add_(gradient, alpha=share)
    wide = moment.to(gradient.dtype).mul_(decay).add_(gradient, alpha=share)
    moment.copy_(_rounded(wide, None if bits is None else bits >> 16))
    return wide


def _rounded(values: Tensor, bits: Tensor | None) -> Tensor:
    """As bfloat16: to nearest even, or by 16 random bits a number."""
    if bits is None:
        return values.to(torch.bfloat16)
    words = values.float().view(torch.int32)
    # A wrap in int32 is the addition of the bit pattern, as unsigned arithmetic has it.
    return ((words + bits.to(torch.int32)) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _random_bits(step: ClassStep, class_ids: Tensor, num_features: int) -> Tensor:
    """(t, D) int64 of 32 random bits each, from (seed, step, class id, feature) alone."""
    start = torch.tensor((step.seed ^ step.step) & _LOW_32, device=class_ids.device)
    rows = _mix(_mix(_mix(start) ^ (class_ids & _LOW_32)) ^ (class_ids >> 32))
    return _mix(rows[:, None] ^ torch.arange(num_features, device=class_ids.device))


def _mix(words: Tensor) -> Tensor:
    """The hash of `ClassStep` on int64 tensors that hold 32 bits."""
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & _LOW_32
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & _LOW_32
    return words ^ (words >> 16)
