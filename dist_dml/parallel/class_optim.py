"""Optimizers of one worker's class weights, outside DDP and DeepSpeed.

Averaging over workers would destroy class weights, because each worker owns other classes.
PyTorch's fused optimizers update in place, so a step needs no memory of the size of the weights
beyond the gradient and the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_dml.config import OptimizerConfig


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, fused: bool
) -> torch.optim.Optimizer:
    """SGD, AdamW or Adam over parameter groups that carry their own weight decay.

    Args:
        groups: dicts with `params`, `weight_decay` and optionally `lr`.
        config: names and rates; `learning_rate` is the default of groups without `lr`.
        fused: one in-place kernel a tensor instead of temporaries of the parameters' size.
    """
    groups = [{"lr": config.learning_rate, **group} for group in groups]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=fused,
        )
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=fused
    )


def build_class_optimizer(
    weight: nn.Parameter, bias: nn.Parameter | None, config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimizer of a shard: `class_multiplier` times the learning rate, no decay of biases."""
    rate = config.learning_rate * config.class_multiplier
    groups: list[dict[str, Any]] = [
        {"params": [weight], "weight_decay": config.class_weight_decay, "lr": rate}
    ]
    if bias is not None:
        groups.append({"params": [bias], "weight_decay": 0.0, "lr": rate})
    return build_optimizer(groups, config, fused=True)


def set_learning_rate(optimizer: Any, base_rates: Iterable[float], factor: float) -> None:
    """Set each group's learning rate to its base rate times the schedule's factor."""
    for group, base in zip(optimizer.param_groups, base_rates, strict=True):
        group["lr"] = base * factor


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """The state as tensors by `parameter|key`, for example `weight|momentum_buffer`.

    Covers all that SGD and Adam keep; state that is not a tensor yet (momentum before the first
    step) is left out.
    """
    return {
        f"{names[parameter]}|{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
) -> None:
    """The inverse of `optimizer_tensors`: parameters without an entry start anew."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("|", 1)
        by_name.setdefault(name, {})[key] = value
    # Adam counts its steps on the CPU, except in its fused form, which counts on the device.
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, name in names.items():
        if name in by_name:
            optimizer.state[parameter] = {
                key: value.to(parameter.device if value.ndim or is_fused else "cpu", copy=True)
                for key, value in by_name[name].items()
            }
