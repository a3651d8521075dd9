"""What stands around the Triton kernels of `sweep_triton`: their arguments, and small products.

Dimensions: R or N rows, n classes that take part, D features, P programs of the forward sweep.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.parallel.class_sweeps import (
    GradientTarget,
    KernelClasses,
    RowCoefficients,
    SoftmaxSums,
    UpdateTarget,
    row_gradient_of_pull,
)
from dist_dml.parallel.triton_blocks import Blocks, padded_features

_NO_RIVAL = torch.finfo(torch.float32).min / 4
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
# What the interpreter stands in for: few cores and a small cache, so that small tests take several
# launches.
_INTERPRETED_CORES, _INTERPRETED_CACHE = 1, 2**16


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def num_cores(device: torch.device) -> int:
    """Streaming multiprocessors."""
    if interpreted():
        return _INTERPRETED_CORES
    return torch.cuda.get_device_properties(device).multi_processor_count


def cache_bytes(device: torch.device) -> int:
    """The L2's size."""
    if interpreted():
        return _INTERPRETED_CACHE
    return torch.cuda.get_device_properties(device).L2_cache_size


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of an operand's dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[dtype]


class Buffers:
    """Tensors by name that are made once, grown where needed, and kept between steps."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A contiguous tensor of this shape; its contents last until the name's next use."""
        count, key = math.prod(shape), f"{name} {dtype} {device}"
        flat = self._flat.get(key)
        if flat is None or len(flat) < count:
            flat = self._flat[key] = torch.empty(count, dtype=dtype, device=device)
        return flat[:count].view(shape)

    def operands(self, rows: Float[Tensor, "R D"], dtype: torch.dtype) -> Float[Tensor, "R D"]:
        """The rows as operands of products."""
        if rows.dtype == dtype:
            return rows.contiguous()
        return self.take("rows", tuple(rows.shape), dtype, rows.device).copy_(rows)


def merged_sums(partial: Float[Tensor, "planes P R"]) -> SoftmaxSums:
    """The programs' statistics in one, from base 2 to base e; deterministic.

    Planes: label, rival, mass, and gap and count where gaps are wanted.
    """
    label, rival, mass = partial[:3]
    largest = rival.amax(0)
    drop = largest - rival
    gap = torch.zeros_like(largest)
    if len(partial) > 3:
        gap = (partial[3] + partial[4] * drop).sum(0).mul_(_LN_2)
    total = (mass * torch.exp2(-drop)).sum(0)
    rival = torch.where(total > 0, largest * _LN_2, _NO_RIVAL)
    return SoftmaxSums(label.amax(0) * _LN_2, rival, total, gap, None, None)


def gradient_of_labels(
    columns: Int[Tensor, " N"],
    coefficients: RowCoefficients,
    classes: KernelClasses,
    num_pulled: int,
) -> Float[Tensor, "R D"]:
    """What the labels' entries of G add to the gradients of the last rows, exactly in float32."""
    last = RowCoefficients(*(part[len(part) - num_pulled :] for part in coefficients))
    nothing = last.label.new_zeros(num_pulled, classes.weight.shape[1])
    own = columns[len(columns) - num_pulled :]
    return row_gradient_of_pull(nothing, own, last.normaliser, last, classes)


def add_product_(
    total_: Float[Tensor, "R D"], left: Float[Tensor, "R b"], right: Float[Tensor, "b D"]
) -> None:
    """total += left @ right in float32, whatever the operands' dtype."""
    if left.dtype == torch.float32 and right.dtype == torch.float32:
        total_.addmm_(left, right)
    elif total_.is_cuda:
        torch.ops.aten.addmm.dtype_out(total_, left, right, torch.float32, out=total_)
    else:  # The interpreter's tensors.
        total_.addmm_(left.float(), right.float())


class BackwardLaunch:
    """The backward kernel's arguments, which are the same for all launches of a sweep."""

    def __init__(
        self,
        buffers: Buffers,
        rows: Float[Tensor, "N D"],
        columns: Int[Tensor, " N"],
        coefficients: RowCoefficients,
        classes: KernelClasses,
        target: GradientTarget | UpdateTarget | None,
        blocks: Blocks,
    ) -> None:
        n, device = classes.num_classes, rows.device
        self._classes, self._blocks, self._num_rows = classes, blocks, len(rows)
        self.bias_gradient = torch.empty(n, dtype=torch.float32, device=device)
        # Rows in the order of their labels: each block of classes finds its own in one place.
        ordered, order = columns.sort(stable=True)
        num_blocks = -(-n // blocks.classes)
        starts = torch.arange(num_blocks + 1, device=device) * blocks.classes
        self._bounds = torch.searchsorted(ordered, starts, out_int32=True)
        self._rows = (rows.contiguous(), buffers.operands(rows, classes.operand_dtype))
        self._of_rows = (columns.to(torch.int32), _terms(coefficients), order)
        self._left_classes = buffers.take("left", (num_blocks,), torch.int32, device)
        self._left_mass = buffers.take("left", (num_blocks,), torch.float32, device)
        self._target, self._options = _target_arguments(target, device)

    def run(
        self, start: int, stop: int, logit_gradients: Tensor | None, old_weights: Tensor | None
    ) -> None:
        """One launch over the classes `start..stop-1`; `start` is a block's first."""
        from dist_dml.parallel.triton_backward import backward_kernel

        classes, blocks = self._classes, self._blocks
        num_pulled = 0 if logit_gradients is None else logit_gradients.shape[1]
        kernel: Any = backward_kernel  # Triton's launch options are in no signature.
        kernel[(-(-(stop - start) // blocks.classes),)](
            *self._rows, *self._of_rows, self._bounds,
            classes.weight, classes.active, classes.bias, logit_gradients, old_weights,
            self.bias_gradient, *self._target, self._left_classes, self._left_mass,
            start, classes.num_classes, self._num_rows, num_pulled,
            float(classes.scale or 1.0), float(classes.filter_below),
            D=classes.weight.shape[1], D_PAD=padded_features(classes.weight.shape[1]),
            BLOCK_R=blocks.rows, BLOCK_C=blocks.classes,
            OPERAND=triton_dtype(classes.operand_dtype), HAS_ACTIVE=classes.active is not None,
            COSINE=classes.scale is not None, HAS_BIAS=classes.bias is not None,
            PULLED=num_pulled > 0, STORE_OLD=old_weights is not None,
            FILTERED=classes.filter_below > 0, num_warps=blocks.warps, num_stages=blocks.stages,
            **self._options,
        )  # fmt: skip

    def filtered(self) -> tuple[int | Tensor, float | Tensor]:
        """Classes and mass that were left out."""
        if self._classes.filter_below == 0:
            return 0, 0.0
        return self._left_classes.sum(), self._left_mass.sum()


def _terms(coefficients: RowCoefficients) -> Float[Tensor, "4 N"]:
    """Coefficients for exponentials to base 2.

    The normaliser is rounded once more on its way to base 2 (6e-4 at 1e4), which the factor gives
    back exactly.
    """
    exact = coefficients.normaliser.double() * _LOG2_E
    normaliser = exact.float()
    factor = coefficients.factor * torch.exp2(normaliser - exact).float()
    return torch.stack((normaliser, factor, coefficients.offset, coefficients.label)).float()


_NO_STEP: dict[str, Any] = {
    "KIND": "sgd",
    "HAS_MOMENTUM": False,
    "NESTEROV": False,
    "CLIPPED": False,
    "STOCHASTIC": False,
    "KAHAN": False,
}
_FIRST_STATE = {"sgd": "momentum_buffer", "adagrad": "sum", "adam": "exp_avg", "adamw": "exp_avg"}


def _target_arguments(
    target: GradientTarget | UpdateTarget | None, device: torch.device
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """The pointers from `target` to `apply`, and the constants that choose the update."""
    from dist_dml.parallel.triton_update import update_numbers

    if target is None:
        return (None,) * 7, {"TARGET": "none", **_NO_STEP}
    if isinstance(target, GradientTarget):
        name = "add" if target.accumulate else "write"
        return (target.gradient, *(None,) * 6), {"TARGET": name, **_NO_STEP}
    step, state = target.step, target.state
    numbers, seeds = update_numbers(step)
    pointers = (
        None,
        state.get(_FIRST_STATE[step.kind]),
        state.get("exp_avg_sq"),
        state.get("compensation"),
        _sent(torch.tensor(numbers, dtype=torch.float32), device),
        _sent(torch.tensor(seeds, dtype=torch.int64), device),
        target.apply.view(torch.uint8),
    )
    return pointers, {
        "TARGET": "update",
        "KIND": step.kind,
        "HAS_MOMENTUM": step.momentum > 0,
        "NESTEROV": step.nesterov,
        "CLIPPED": step.clip_norm > 0,
        "STOCHASTIC": step.rounding == "stochastic",
        "KAHAN": step.rounding == "kahan",
    }


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
