"""Batch normalisation with the statistics of the whole batch, on any backend.

`torch.nn.SyncBatchNorm` does the same on CUDA and refuses CPU tensors. Plain batch norm under data
parallelism normalises every worker's rows by themselves, so that N workers compute another function
than one process: here they compute the same.

Dimensions: r rows of this worker, C channels, W workers, n values of a channel in the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from dist_dml.errors import UsageError
from dist_dml.parallel.collectives import gather_equal

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class WholeBatchNorm(nn.Module):
    """Batch norm over all workers' rows; the second dimension is the channel.

    Equal, on every worker's rows, to `nn.BatchNorm{1,2,3}d` of one process on all workers' rows in
    worker order: outputs, running statistics and input gradients. The gradients of weight and bias
    are sums over this worker's rows, as those of any layer: the engine adds them up. Rows may be
    uneven, and a worker may have none. Statistics are float32 for bfloat16 inputs.

    Differs from torch in one point: a batch with one value a channel (a last batch of one row)
    gives the bias and leaves the running statistics alone, where torch raises.

    Costs in training one all-gather of 2C + 1 numbers forward and one of 2C backward.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats: as for `nn.BatchNorm2d`.
        group: the workers, or None for one process.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        group: ProcessGroup | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.group = group
        self.eps = eps
        self.momentum = momentum
        # An attribute of its own, and not `self.training`, which every `.train()` of a parent sets:
        # statistics that are frozen stay so.
        self.frozen = False
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)
        # timm's BatchNormAct2d does three things in one; the other two are put here.
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, values: Float[Tensor, "r C *positions"]) -> Float[Tensor, "r C *positions"]:
        """Normalised `values`, in their dtype and memory format."""
        return self.act(self.drop(self._normalise(values)))

    def extra_repr(self) -> str:
        workers = 1 if self.group is None else self.group.size()
        return f"{self.num_features}, eps={self.eps}, workers={workers}, frozen={self.frozen}"

    def _normalise(self, values: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if mean is not None and (self.frozen or not self.training):
            return F.batch_norm(values, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        updates = self.training and mean is not None
        factor = self._update_factor() if updates else 0.0
        alone = self.group is None or self.group.size() == 1
        if alone and values.numel() > values.shape[1] and not isinstance(factor, Tensor):
            buffers = (mean, var) if updates else (None, None)
            return F.batch_norm(values, *buffers, self.weight, self.bias, True, factor, self.eps)
        output, batch_mean, squares, count = _WholeBatchNorm.apply(
            values, self.weight, self.bias, self.eps, self.group
        )
        if updates and mean is not None and var is not None:
            with torch.no_grad():
                # One value has no variance (0 / 0): such a batch changes nothing.
                factor = factor * (count > 1).to(mean.dtype)
                mean.lerp_(batch_mean.to(mean.dtype), factor)
                var.lerp_((squares / (count - 1).clamp(min=1)).to(var.dtype), factor)
        return output

    def _update_factor(self) -> float | Tensor:
        """The weight of this batch in the running statistics; counts the batch."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)


class _WholeBatchNorm(torch.autograd.Function):
    """Returns the output, and of the whole batch the mean, sum of squared deviations, and count."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, squares, count = _whole_statistics(values, group)
        var = squares / count.clamp(min=1)
        # With given statistics, the evaluation kernel is the fused affine map that is wanted here.
        output = F.batch_norm(values, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(values, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, squares, count)
        return output, mean, squares, count

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        gradient, (values, weight, mean, var, count) = gradients[0], ctx.saved_tensors
        # With h = (x - mean) / sqrt(var + eps), y = w * h + b and n values a channel:
        # dL/dx = w / sqrt(var + eps) * (dy - sum(dy) / n - h * sum(dy * h) / n), over all rows.
        sum_dy, sum_dy_h = _local_sums(gradient, values, mean, var, ctx.eps)
        values_gradient = None
        if ctx.needs_input_grad[0]:
            sums = gather_equal(torch.stack((sum_dy, sum_dy_h)), ctx.group).sum(dim=0)
            sums = sums / count.clamp(min=1)
            inverse = torch.rsqrt(var + ctx.eps)
            scale = inverse if weight is None else inverse * weight
            slope = -scale * inverse * sums[1]
            shape = (1, -1) + (1,) * (values.dim() - 2)
            offset = (-scale * sums[0]).view(shape)
            result = (values - mean.view(shape)).mul_(slope.view(shape)).add_(offset)
            values_gradient = result.addcmul_(gradient, scale.view(shape)).to(values.dtype)
        if weight is None:
            return values_gradient, None, None, None, None
        return values_gradient, sum_dy_h.to(weight.dtype), sum_dy.to(weight.dtype), None, None


def _whole_statistics(values: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), sum of squared deviations (C,) and count () of a channel over all workers."""
    channels = values.shape[1]
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(channels, dtype=dtype, device=values.device)
    mean, var = zeros, zeros
    if values.numel() > 0:
        # The kernel refuses empty input. It accumulates in the dtype of the buffers it is given,
        # their only use here. var_mean would do, at 5 to 17 times the time (2026-11, one CPU core).
        mean, var = torch.batch_norm_update_stats(values, zeros, zeros.clone(), 0.0)
    count = torch.full((1,), values.numel() // channels, dtype=dtype, device=values.device)
    packed = torch.cat((mean.to(dtype), var.to(dtype) * count, count))
    gathered = gather_equal(packed, group)
    means, squares, counts = gathered.split((channels, channels, 1), dim=1)
    # Chan, Golub and LeVeque's merge (1983) of all workers at once, in worker order: every worker
    # adds the same numbers in the same order, hence gets the same bits.
    count = counts.sum()
    mean = (counts * means).sum(dim=0) / count.clamp(min=1)
    return mean, (squares + counts * (means - mean) ** 2).sum(dim=0), count


def _local_sums(
    gradient: Tensor, values: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`sum(dy)` and `sum(dy * h)` over this worker's rows, both (C,)."""
    if values.numel() == 0:  # The kernel divides by zero, which ends the process.
        return torch.zeros_like(mean), torch.zeros_like(mean)
    ones = torch.ones_like(mean)
    _, sum_dy_h, sum_dy = torch.ops.aten.native_batch_norm_backward(
        gradient, values, ones, mean, var, None, None, False, eps, [False, True, True]
    )
    return sum_dy, sum_dy_h


def convert_batch_norm(module: nn.Module, group: ProcessGroup | None) -> nn.Module:
    """`module` with every batch norm replaced by a `WholeBatchNorm` of the same values.

    Replaces children of `module` in place (and returns a new module only where `module` itself is
    a batch norm). Parameters and buffers are the same tensors under the same names, so that the
    keys of `state_dict` stay. timm's BatchNormAct2d keeps its drop and act.

    Raises:
        UsageError: for a layer that keeps batch statistics in another way, with several workers.
    """
    if type(module) in _PLAIN or (isinstance(module, _BatchNorm) and hasattr(module, "act")):
        assert isinstance(module, _BatchNorm)
        return _converted(module, group)
    has_statistics = module._buffers.get("running_var") is not None
    if has_statistics and not isinstance(module, WholeBatchNorm) and group and group.size() > 1:
        raise UsageError(
            f"model.backbone has a layer of type {type(module).__name__}, whose batch statistics "
            f"cannot be shared by {group.size()} workers; use one worker or another backbone"
        )
    for name, child in module.named_children():
        converted = convert_batch_norm(child, group)
        if converted is not child:
            setattr(module, name, converted)
    return module


def _converted(module: _BatchNorm, group: ProcessGroup | None) -> WholeBatchNorm:
    whole = WholeBatchNorm(
        module.num_features,
        group,
        module.eps,
        module.momentum,
        module.affine,
        module.track_running_stats,
    )
    whole.weight, whole.bias = module.weight, module.bias
    whole.running_mean, whole.running_var = module.running_mean, module.running_var
    whole.num_batches_tracked = module.num_batches_tracked
    whole.drop = getattr(module, "drop", whole.drop)
    whole.act = getattr(module, "act", whole.act)
    whole.train(module.training)
    return whole


def freeze_batch_norm(module: nn.Module) -> None:
    """Freeze the running statistics of every `WholeBatchNorm` in `module`, also in training.

    Papers B and C: weight and bias go on training. `.train()` does not thaw them.

    Raises:
        UsageError: if one keeps no running statistics.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, WholeBatchNorm):
            continue
        if layer.running_mean is None:
            raise UsageError(
                f"model.frozen_batch_norm=true, but layer {name} of model.backbone keeps no "
                "running statistics to freeze; set it to false or use another backbone"
            )
        layer.frozen = True
